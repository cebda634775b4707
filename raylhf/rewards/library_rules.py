"""Leaves that score a response's text by a library: language, spelling, usage, toxicity.

They score its first MAX_LIBRARY_CHARACTERS characters.
"""

import re
import unicodedata

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.rules import MAX_LIBRARY_CHARACTERS
from raylhf.rewards.validity import score_each


class LanguageReward:
    """Probability among py3langid's languages that a response is in `language`; 0 for a response without text.

    A text too short or too odd for the model (`ok`, `12345`) is about as likely in any language: about 0.01.
    """

    def __init__(self, *, language: str):
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        if language not in self._identifier.labels:
            known = ", ".join(sorted(label for label in self._identifier.labels if len(label) == 2))
            raise ValueError(f"the language reward's language={language!r} is unknown to py3langid; it knows {known}")
        self._language = language

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("language", rollouts, lambda _, text: self.score_text(text[:MAX_LIBRARY_CHARACTERS]))

    def score_text(self, text: str) -> float:
        """The score of one response."""
        return dict(self._identifier.rank(text))[self._language] if text.strip() else 0.0


APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'"})
WORD = re.compile(r"(?<!\w)(?<!\w')[^\W\d_]+(?:'[^\W\d_]+)*(?!\w)")
"""Letters, apostrophes inside allowed; not a part of something with digits or underscores."""


class SpellingReward:
    """Share of the response's words that pyspellchecker's dictionary knows; 0 without a word to check.

    A word that starts upper-case in mid-sentence counts as a name and is left out (in German also the nouns). A
    response that writes every word so escapes the check, but for the first words of its sentences.
    """

    def __init__(self, *, language: str):
        from spellchecker import SpellChecker

        self._dictionary = SpellChecker(language=language)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("spelling", rollouts, lambda _, text: self.score_text(text[:MAX_LIBRARY_CHARACTERS]))

    def score_text(self, text: str) -> float:
        """The score of one response."""
        words = words_to_check(text)
        return sum(word in self._dictionary for word in words) / len(words) if words else 0.0


def words_to_check(text: str) -> list[str]:
    """Lower-cased words of letters, without names."""
    text = unicodedata.normalize("NFC", text).translate(APOSTROPHES)
    words = []
    previous_end = 0
    for match in WORD.finditer(text):
        gap = text[previous_end : match.start()]
        starts_sentence = previous_end == 0 or any(sign in gap for sign in ".!?:\n")
        if starts_sentence or not match[0][0].isupper():
            words.append(match[0].lower())
        previous_end = match.end()
    return words


class WritingReward:
    """Minus the faults in 100 words that proselint finds, at least -1; 0 for a response without words.

    So any fault in a response of up to 100 words makes -1. The typography of symbols is left out, which asks for curly
    quotes and the ellipsis sign where `FormatReward` wants plain text.
    """

    def __init__(self) -> None:
        from proselint.checks import __register__
        from proselint.config import DEFAULT, Config
        from proselint.registry import CheckRegistry

        # The registry is one for the process: a second registration would count every fault twice.
        if not CheckRegistry().checks:
            CheckRegistry().register_many(__register__)
        checks = {"typography.symbols": False, **DEFAULT["checks"]}
        self._config = Config(max_errors=DEFAULT["max_errors"], checks=checks)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("writing", rollouts, lambda _, text: self.score_text(text[:MAX_LIBRARY_CHARACTERS]))

    def score_text(self, text: str) -> float:
        """The score of one response; words are what white space separates."""
        from proselint.tools import LintFile

        num_words = len(text.split())
        if num_words == 0:
            return 0.0
        num_faults = len(LintFile("<response>", text).lint(self._config))
        return -min(1.0, 100 * num_faults / num_words)


class ToxicityReward:
    """Minus alt-profanity-check's probability that the response is offensive, in [-1, 0] (English)."""

    def __init__(self) -> None:
        from profanity_check import predict_prob

        self._probability = predict_prob

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("toxicity", rollouts, lambda _, text: self.score_text(text[:MAX_LIBRARY_CHARACTERS]))

    def score_text(self, text: str) -> float:
        """The score of one text."""
        return -self._probability([text])[0]
