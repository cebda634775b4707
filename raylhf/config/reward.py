"""The reward graph: leaves score responses, nodes combine scores."""

from typing import Annotated, Literal

from pydantic import Field

from raylhf.config.base import Settings


class SentimentReward(Settings):
    """VADER's human-rated sentiment lexicon (Hutto and Gilbert 2014): the compound score in [-1, 1]."""

    kind: Literal["sentiment"]


class LengthReward(Settings):
    """1 inside [min_words, max_words], falling linearly to 0 within `slack` words outside of it."""

    kind: Literal["length"]
    min_words: int = Field(default=8, ge=0)
    """Shortest response with the full score."""
    max_words: int = Field(default=40, ge=1)
    """Longest response with the full score."""
    slack: int = Field(default=8, ge=1)
    """Words over which the score falls from 1 to 0."""


class FormatReward(Settings):
    """Share of checks passed: starts like a sentence, ends like one, no word-sequence repetition, plain ASCII text."""

    kind: Literal["format"]


class FunctionReward(Settings):
    """Your own function by dotted path: f(prompt, response, metadata) -> float (None or NaN: invalid)."""

    kind: Literal["function"]
    path: str
    """`package.module:function`, importable on the reward worker."""


class CharacterReward(Settings):
    """Share of the response's characters that are in `characters` (learnable by the tiny byte-level model)."""

    kind: Literal["characters"]
    characters: str = Field(min_length=1)
    """Characters that count."""


class WeightedPart(Settings):
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name under which the part is logged (`reward/part/NAME_mean`)."""
    weight: float = 1.0
    """Factor of the part in the sum."""
    reward: "RewardConfig"
    """A leaf or another node."""


class SumReward(Settings):
    """Weighted sum of its parts; invalid where any part is invalid."""

    kind: Literal["sum"]
    parts: tuple[WeightedPart, ...] = Field(min_length=1)
    """The summands."""


RewardConfig = Annotated[
    SentimentReward | LengthReward | FormatReward | FunctionReward | CharacterReward | SumReward,
    Field(discriminator="kind"),
]
WeightedPart.model_rebuild()
SumReward.model_rebuild()


class RewardPlaneConfig(Settings):
    graph: RewardConfig
    """The reward: one leaf, or a node over several."""
    replicas: int = Field(default=1, ge=1)
    """Reward workers."""
    num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves for one reward worker."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a response that ran into max_response_tokens."""
    clip: float | None = Field(default=None, gt=0)
    """Clip scores (after the penalty) to [-clip, clip]; null leaves them."""
