"""Leaves that score a response's text by rule."""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.validity import score_each


class SentimentReward:
    """VADER's compound score in [-1, 1] (Hutto and Gilbert 2014); 0 for a text without a word of its lexicon."""

    arity: Literal["point", "group"] = "point"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("sentiment", rollouts, lambda _, text: self._analyzer.polarity_scores(text)["compound"])


class LengthReward:
    """1 inside [min_words, max_words], falling linearly to 0 at `slack` words outside of it."""

    arity: Literal["point", "group"] = "point"

    def __init__(self, *, min_words: int, max_words: int, slack: int):
        if min_words > max_words:
            raise ValueError(f"the length reward's min_words={min_words} is above its max_words={max_words}; swap them")
        self._min_words = min_words
        self._max_words = max_words
        self._slack = slack

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("length", rollouts, lambda _, text: self.score_text(text))

    def score_text(self, text: str) -> float:
        """The score of one response; words are what whitespace separates."""
        num_words = len(text.split())
        num_outside = max(self._min_words - num_words, num_words - self._max_words, 0)
        return max(0.0, 1.0 - num_outside / self._slack)


class FormatReward:
    """Share of the four checks of `format_checks` that a response passes: 0, 1/4, ... 1."""

    arity: Literal["point", "group"] = "point"

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("format", rollouts, lambda _, text: sum(format_checks(text).values()) / 4)


STARTS_LIKE_A_SENTENCE = re.compile(r"[\"'(]?[A-Z0-9]")
ENDS_LIKE_A_SENTENCE = re.compile(r"[.!?][\"')]?$")
CURLY_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")
MIN_ASCII_SHARE = 0.95
"""Leaves room for a curly quote, a dash or an accent in a sentence of English."""


def format_checks(text: str) -> dict[str, bool]:
    """Four signs of a well-formed English chat answer, each a frequent failure of a small or drifting policy.

    `starts`: begins with an upper-case letter or a digit, a quote or bracket before it allowed (no cut-in beginning).
    `ends`: ends with . ! or ?, a closing quote or bracket after it allowed (not cut off in the middle).
    `repeats_nothing`: no run of three words stands in it three times or more (no loops).
    `plain_text`: at least 95 % of the characters are printable ASCII, curly quotes counted as straight (no garbage).
    White space around the text is ignored; an empty response passes none.
    """
    text = text.strip().translate(CURLY_QUOTES)
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    num_plain = sum(character in string.printable for character in text)
    return {
        "starts": STARTS_LIKE_A_SENTENCE.match(text) is not None,
        "ends": ENDS_LIKE_A_SENTENCE.search(text) is not None,
        "repeats_nothing": bool(text) and max(triples.values(), default=0) < 3,
        "plain_text": bool(text) and num_plain >= MIN_ASCII_SHARE * len(text),
    }


class CharacterReward:
    """Share of the response's characters that are in `characters`; 0 for a response without text."""

    arity: Literal["point", "group"] = "point"

    def __init__(self, *, characters: str):
        self._characters = frozenset(characters)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("characters", rollouts, lambda _, text: self.score_text(text))

    def score_text(self, text: str) -> float:
        """The score of one response."""
        return sum(character in self._characters for character in text) / max(len(text), 1)


class FunctionReward:
    """A user's `f(prompt, response, metadata)`: the last user turn, the response's text, the rest of the data row."""

    arity: Literal["point", "group"] = "point"

    def __init__(self, *, path: str):
        self._path = path
        self._function = import_function(path)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each(self._path, rollouts, lambda prompt, text: self._function(prompt.text, text, prompt.metadata))


def import_function(path: str) -> Callable[..., Any]:
    """The function of `package.module:function`; a ValueError says what is missing."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"the function reward's path={path!r} must read package.module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the function reward's path={path!r} cannot be imported on this reward worker: {error}; "
            "install the module on every node, or put its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"the function reward's path={path!r} names a {type(function).__name__}, not a function")
    return function
