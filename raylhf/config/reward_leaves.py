"""Leaves of the reward graph: what scores a response by itself."""

from typing import Any, Literal

from pydantic import Field

from raylhf.config.base import Settings

FailurePolicy = Literal["drop", "raise", "resample"]


class Leaf(Settings):
    on_failure: FailurePolicy = "drop"
    """A failed score: drop the response and count it, stop the run, or sample the prompt's group anew (then drop)."""


class SentimentReward(Leaf):
    """VADER's human-rated sentiment lexicon (Hutto and Gilbert 2014): the compound score in [-1, 1]."""

    kind: Literal["sentiment"]


class LengthReward(Leaf):
    """1 inside [min_words, max_words], falling linearly to 0 within `slack` words outside of it."""

    kind: Literal["length"]
    min_words: int = Field(default=8, ge=0)
    """Shortest response with the full score."""
    max_words: int = Field(default=40, ge=1)
    """Longest response with the full score."""
    slack: int = Field(default=8, ge=1)
    """Words over which the score falls from 1 to 0."""


class OverlongReward(Leaf):
    """0 up to max_tokens - buffer, falling linearly to -1 at max_tokens (DAPO's soft punishment, 2503.14476)."""

    kind: Literal["overlong"]
    max_tokens: int = Field(ge=1)
    """Response tokens from which the score is -1."""
    buffer: int = Field(ge=1)
    """Tokens over which it falls (DAPO: 4096 of 20480)."""


class FormatReward(Leaf):
    """Share of checks passed: starts like a sentence, ends like one, no word-sequence repetition, plain ASCII text."""

    kind: Literal["format"]


class RepetitionReward(Leaf):
    """Minus the share of word n-grams that repeat an earlier one: 0 without repetition, towards -1 in a loop."""

    kind: Literal["repetition"]
    ngram: int = Field(default=3, ge=1)
    """Words of an n-gram."""


class RegexReward(Leaf):
    """1 where the response matches, else 0."""

    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    """A Python regular expression; `.` matches line ends too."""
    whole: bool = False
    """The whole response must match (white space around it ignored), not a part of it."""


class JsonReward(Leaf):
    """1 where the response is JSON (alone, or in its only code fence) that fits the schema, else 0."""

    kind: Literal["json"]
    json_schema: dict[str, Any] | None = None
    """JSON Schema (draft 2020-12) that it must fit; null asks for JSON alone."""


class LanguageReward(Leaf):
    """Probability that the response is in `language` (py3langid)."""

    kind: Literal["language"]
    language: str = Field(pattern=r"^[a-z]{2}$")
    """ISO 639-1 code, for instance en."""


class SpellingReward(Leaf):
    """Share of the response's words that a dictionary knows (pyspellchecker); names and numbers are left out."""

    kind: Literal["spelling"]
    language: Literal["en", "es", "fr", "pt", "de", "it", "ru", "ar", "lv", "eu", "nl", "fa"] = "en"
    """Dictionary."""


class WritingReward(Leaf):
    """Minus the number of usage and style faults in 100 words that proselint finds, at least -1 (English)."""

    kind: Literal["writing"]


class ToxicityReward(Leaf):
    """Minus the probability that the response is offensive, by a linear model on words (alt-profanity-check)."""

    kind: Literal["toxicity"]


class AnswerReward(Leaf):
    """1 where the response's final answer equals the reference, else 0; mathematically (math-verify) or as text."""

    kind: Literal["answer"]
    answer_key: str = "answer"
    """Field of the data row that holds the reference answer; for GSM8K, what follows `####` in it counts."""
    match: Literal["math", "text"] = "math"
    """`math`: equal as numbers or expressions; `text`: equal up to case, white space and punctuation at the ends."""
    pattern: str | None = None
    """Regular expression whose last match in the response holds the answer (its first group); null: math-verify's own
    extraction (`math`) or the last line (`text`)."""


class FunctionReward(Leaf):
    """Your own function by dotted path: f(prompt, response, metadata) -> float (None or NaN: invalid)."""

    kind: Literal["function"]
    path: str
    """`package.module:function`, importable on the reward worker."""


class CharacterReward(Leaf):
    """Share of the response's characters that are in `characters` (learnable by the tiny byte-level model)."""

    kind: Literal["characters"]
    characters: str = Field(min_length=1)
    """Characters that count."""


class ModelLeaf(Leaf):
    path: str
    """Hugging Face folder or name, or `tiny`."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest prompt plus response in the reward model's own tokens; the prompt's beginning is cut first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the reward model."""
    trust_remote_code: bool = False
    """Run code that the model's repository ships: Python files, and what pickled weights (.bin) hold."""


class ExplicitReward(ModelLeaf):
    """A reward model with one output: a sequence-classification model, such as `raylhf train` writes."""

    kind: Literal["explicit"]
    output: int = Field(default=0, ge=0)
    """Which output of several is the score; of a classifier into classes, its log-odds against the rest."""


class TokenLevelReward(ModelLeaf):
    """A token-classification reward model: one score a token, dense rewards for PPO."""

    kind: Literal["token_level"]
    aggregate: Literal["sum", "mean", "last"] | None = None
    """How token scores make the response's score; the dense scores are scaled to add to it. Null: as the model was
    trained, which its folder says, and the mean for other models."""
    link: Literal["identity", "probability"] = "identity"
    """probability: a token scores 2 sigmoid(output) - 1, from -1 to 1 (TLCR, 2407.16574; trained on `edits`)."""


class ProcessReward(ModelLeaf):
    """A token-classification model read at the end of each step: 2 P(correct) - 1 a step, dense rewards for PPO."""

    kind: Literal["process"]
    separator: str = "\n\n"
    """What stands between two steps of a response."""
    aggregate: Literal["min", "product", "mean", "last"] = "min"
    """How steps make the response's score: min is PURE's credit (2504.15275), product is PRM800K's (2305.20050)."""
    temperature: float = Field(default=0.1, gt=0)
    """Of PURE's soft minimum (`min`)."""


class EnsembleReward(Leaf):
    """Several reward models, or one with several heads; a node above combines the members, else their mean counts."""

    kind: Literal["ensemble"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Folders of the members; a single folder that `raylhf train` wrote with an ensemble head holds all of them."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest prompt plus response in the reward model's own tokens; the prompt's beginning is cut first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the members."""
    trust_remote_code: bool = False
    """Run code that the models' repositories ship: Python files, and what pickled weights (.bin) hold."""


class MultiValueReward(ModelLeaf):
    """A reward model with one output an attribute; a node above it combines them, else their weighted sum counts."""

    kind: Literal["multi_value"]
    weights: dict[str, float] | None = None
    """Weight of each attribute in the score; null means their mean."""


class ImplicitReward(Leaf):
    """beta times the log-ratio of two language models: the reward that a DPO-trained policy implies (2305.18290)."""

    kind: Literal["implicit"]
    policy: str
    """The trained language model: folder, name, `package:NAME` or `tiny`."""
    reference: str
    """The one that it started from."""
    beta: float = Field(default=0.1, gt=0)
    """DPO's beta."""
    form: Literal["sequence", "token"] = "sequence"
    """One score a response, or dense scores as well."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest prompt plus response in the models' own tokens; the prompt's beginning is cut first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the models."""
    trust_remote_code: bool = False
    """Run code that the models' repositories ship: Python files, and what pickled weights (.bin) hold."""


class RemoteReward(Leaf):
    """Scores over HTTP, from `raylhf serve-reward` or any server that speaks its protocol (docs/reward_protocol.md)."""

    kind: Literal["remote"]
    url: str = Field(pattern=r"^https?://")
    """Base address of the server; `/score` and `/health` are added."""
    token_env: str | None = None
    """Environment variable on the reward worker that holds the bearer token."""
    token_file: str | None = None
    """File on the reward worker that holds the bearer token."""
    deadline_s: float = Field(default=60.0, gt=0)
    """For all responses scored in one call, attempts and waits included; what has no answer then has failed."""
    attempt_timeout_s: float = Field(default=20.0, gt=0)
    """For one attempt."""
    retries: int = Field(default=3, ge=0)
    """Further attempts after a connection error, a timeout, 429 or 5xx; waits between them grow, with jitter."""
    batch_size: int = Field(default=64, ge=1)
    """Responses in one request."""
    max_response_bytes: int = Field(default=4_194_304, ge=1024)
    """A larger answer is refused without being read."""
    breaker_failures: int = Field(default=5, ge=1)
    """Failed batches in a row after which the server is left alone."""
    breaker_reset_s: float = Field(default=30.0, gt=0)
    """How long, before its health is probed again."""
