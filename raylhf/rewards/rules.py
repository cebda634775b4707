"""Leaves that score a response's text by rule."""

import importlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import regex

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.validity import score_each

MAX_LIBRARY_CHARACTERS = 10_000
"""Of a response's beginning, which rewards by a library score: VADER's time grows with the square of the length, and
one response must not hold up all others."""


class SentimentReward:
    """VADER's compound score in [-1, 1] (Hutto and Gilbert 2014); 0 for a text without a word of its lexicon.

    The first MAX_LIBRARY_CHARACTERS characters are scored.
    """

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("sentiment", rollouts, lambda _, text: self.score_text(text[:MAX_LIBRARY_CHARACTERS]))

    def score_text(self, text: str) -> float:
        """The score of one text."""
        return self._analyzer.polarity_scores(text)["compound"]


class LengthReward:
    """1 inside [min_words, max_words], falling linearly to 0 at `slack` words outside of it."""

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


class OverlongReward:
    """DAPO's soft punishment (2503.14476): 0 up to max_tokens - buffer, falling linearly to -1 at max_tokens."""

    def __init__(self, *, max_tokens: int, buffer: int):
        if buffer > max_tokens:
            raise ValueError(
                f"the overlong reward's buffer={buffer} is above its max_tokens={max_tokens}, "
                "which would punish even an empty response; make the buffer smaller"
            )
        self._max_tokens = max_tokens
        self._buffer = buffer

    def score(self, rollouts: Rollouts) -> RewardOutput:
        num_over = rollouts.response_lengths - (self._max_tokens - self._buffer)
        scores = -np.clip(num_over, 0, self._buffer) / self._buffer
        return RewardOutput(scores=scores, valid=np.ones(len(scores), dtype=bool))


class FormatReward:
    """Share of the four checks of `format_checks` that a response passes: 0, 1/4, ... 1."""

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
    triples = Counter(ngrams(text, 3))
    num_plain = sum(character in string.printable for character in text)
    return {
        "starts": STARTS_LIKE_A_SENTENCE.match(text) is not None,
        "ends": ENDS_LIKE_A_SENTENCE.search(text) is not None,
        "repeats_nothing": bool(text) and max(triples.values(), default=0) < 3,
        "plain_text": bool(text) and num_plain >= MIN_ASCII_SHARE * len(text),
    }


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words, overlapping; case and punctuation around a word do not count."""
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    return list(zip(*(words[i:] for i in range(n)), strict=False))


class RepetitionReward:
    """Distinct word n-grams over all of them (distinct-n, 1510.03055), minus 1; 0 for a text of n words or fewer."""

    def __init__(self, *, ngram: int):
        self._ngram = ngram

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("repetition", rollouts, lambda _, text: self.score_text(text))

    def score_text(self, text: str) -> float:
        """The score of one response."""
        runs = ngrams(text, self._ngram)
        return len(set(runs)) / len(runs) - 1 if runs else 0.0


REGEX_LIMIT_S = 1.0
"""For one search: a pattern such as (a+)+$ can take exponential time. A score that takes longer has failed."""


def compile_pattern(pattern: str, owner: str) -> Any:
    """A `regex` pattern, which takes a `timeout` where it is used; `.` matches line ends. `owner` is for the error."""
    try:
        return regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"{owner}'s pattern={pattern!r} is not a regular expression: {error}") from error


class RegexReward:
    """1 where the pattern is found in the response, or with `whole` matches all of it, else 0."""

    def __init__(self, *, pattern: str, whole: bool):
        self._pattern = compile_pattern(pattern, "the regex reward")
        self._whole = whole

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("regex", rollouts, lambda _, text: self.score_text(text))

    def score_text(self, text: str) -> float:
        """The score of one response. Raises TimeoutError after REGEX_LIMIT_S."""
        if self._whole:
            return float(self._pattern.fullmatch(text.strip(), timeout=REGEX_LIMIT_S) is not None)
        return float(self._pattern.search(text, timeout=REGEX_LIMIT_S) is not None)


CODE_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


class JsonReward:
    """1 where the response, or the content of its only code fence, is JSON that fits the schema, else 0.

    A response over which one of the schema's regular expressions takes more than REGEX_LIMIT_S has no score.
    """

    def __init__(self, *, json_schema: Mapping[str, Any] | None):
        self._validator = None if json_schema is None else schema_validator(json_schema)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("json", rollouts, lambda _, text: self.score_text(text))

    def score_text(self, text: str) -> float:
        """The score of one response. Raises TimeoutError after REGEX_LIMIT_S in one search."""
        fenced = CODE_FENCE.findall(text)
        try:
            value = json.loads(fenced[0] if len(fenced) == 1 else text, parse_constant=refuse_constant)
        except (ValueError, RecursionError):  # a loop of opening brackets is no JSON either
            return 0.0
        return float(self._validator is None or self._validator.is_valid(value))


def refuse_constant(name: str) -> NoReturn:
    """Python reads NaN and Infinity; JSON (RFC 8259) does not have them."""
    raise ValueError(f"{name} is not JSON")


def schema_validator(json_schema: Mapping[str, Any]) -> Any:
    """Validator of a draft 2020-12 schema, whose searches have a time limit.

    References to other documents are never fetched: they fail the score.
    """
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import extend
    from referencing import Registry

    from raylhf.rewards.json_patterns import TIMED_KEYWORDS, refuse_untimed

    try:
        Draft202012Validator.check_schema(json_schema)
    except SchemaError as error:
        raise ValueError(
            f"the json reward's json_schema is not a JSON Schema: {error.message} (at {error.json_path})"
        ) from error
    refuse_untimed(json_schema)
    # With its $schema, a reference to the root would be checked by the library's own validator of that draft.
    rest = {key: value for key, value in json_schema.items() if key != "$schema"}
    return extend(Draft202012Validator, TIMED_KEYWORDS)(rest, registry=Registry())


class CharacterReward:
    """Share of the response's characters that are in `characters`; 0 for a response without text."""

    def __init__(self, *, characters: str):
        self._characters = frozenset(characters)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("characters", rollouts, lambda _, text: self.score_text(text))

    def score_text(self, text: str) -> float:
        """The score of one response."""
        return sum(character in self._characters for character in text) / max(len(text), 1)


class FunctionReward:
    """A user's `f(prompt, response, metadata)`: the last user turn, the response's text, the rest of the data row."""

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
