"""Training a reward model: loss and head."""

from typing import Annotated, Literal

from pydantic import Field

from raylhf.config.base import Settings


class MSELoss(Settings):
    """Pointwise regression on scores or attributes (missing ones are left out)."""

    kind: Literal["mse"]
    standardize: bool = True
    """Learn (score - mean) / std of the training scores, per attribute; the constants go into the calibration file."""
    use_rater_std: bool = False
    """Weight each score by 1 / (s^2 + v), scaled to mean 1: s is its raters' deviation (`score_std`), v the variance of
    the training scores, which bounds the weight of a score on which few raters happened to agree."""


class BradleyTerryLoss(Settings):
    """Pairwise logistic loss (2203.02155), averaged over all pairs of a prompt."""

    kind: Literal["bradley_terry"]
    use_margin: bool = False
    """Subtract the row's `margin` from the gap (2307.09288)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong (cDPO's convention); a row's `agreement` replaces it."""
    center_coef: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps scores around 0 (2312.09244 uses 0.01)."""


class PlackettLuceLoss(Settings):
    """Listwise likelihood of the ranking, divided by its number of choices; ties average their orders (Efron)."""

    kind: Literal["plackett_luce"]
    top: int | None = Field(default=None, ge=1)
    """Only the first so many places count; null means all."""


class TokenAggregateLoss(Settings):
    """Bradley-Terry on an aggregate of token scores: no token labels needed."""

    kind: Literal["token_aggregate"]
    aggregate: Literal["sum", "mean", "last"] = "mean"
    """sum couples the score with length; mean does not; last is an ordinary reward model's."""
    use_margin: bool = False
    """Subtract the row's `margin` from the gap."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    center_coef: float = Field(default=0.0, ge=0)
    """Weight of (chosen + rejected)^2."""


class TokenStepLoss(Settings):
    """Bradley-Terry at every position, for pairs whose positions are comparable; divided by their number."""

    kind: Literal["token_step"]
    past_shorter: Literal["truncate", "zero", "hold"] = "truncate"
    """Past the end of the shorter answer: stop, take 0 for its scores, or hold its last score."""


class ProcessLoss(Settings):
    """Cross-entropy at the end of each labelled step (2305.20050); labels after the first error may be missing."""

    kind: Literal["process"]


RewardLoss = Annotated[
    MSELoss | BradleyTerryLoss | PlackettLuceLoss | TokenAggregateLoss | TokenStepLoss | ProcessLoss,
    Field(discriminator="kind"),
]


class ScalarHead(Settings):
    """One score a response, read at its last token."""

    kind: Literal["scalar"] = "scalar"


class TokenHead(Settings):
    """One score a token."""

    kind: Literal["token"]


class MultiValueHead(Settings):
    """One score an attribute."""

    kind: Literal["multi_value"]
    attributes: tuple[str, ...] = Field(min_length=1)
    """Names, as in the data's `attributes`."""


class EnsembleHead(Settings):
    """Several members, each with its own start and its own order of (or weights over) the data (2310.02743)."""

    kind: Literal["ensemble"]
    members: int = Field(default=5, ge=2)
    """Number of members."""
    trunk: Literal["shared", "lora"] = "shared"
    """Heads on one trunk (cheap; each weights every prompt by its own Poisson(1) draw), or an adapter and head each
    (each in its own order; needs learner.lora)."""


RewardHead = Annotated[ScalarHead | TokenHead | MultiValueHead | EnsembleHead, Field(discriminator="kind")]


class RewardModelConfig(Settings):
    """Train a reward model on judgements."""

    kind: Literal["reward_model"]
    loss: RewardLoss
    """What is minimised."""
    head: RewardHead = ScalarHead()
    """What the model outputs."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the data (one is usual: more overfits, 2203.02155)."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts in one optimizer step, with all their comparisons."""
    trainable_layers: int | None = Field(default=None, ge=0)
    """Only the top so many layers (and the head) learn. A decoder's lower layers are computed once a text and kept in
    memory, unless under ZeRO-3, with layers of different kinds, or where it would take more than 4 GiB."""


class RewardEvaluationConfig(Settings):
    every_steps: int = Field(default=0, ge=0)
    """Evaluate on the held-out prompts every N steps; 0 means at the start and the end only."""
    num_bins: int = Field(default=10, ge=2)
    """Bins of the calibration error and of the reliability plot."""
    num_samples: int = Field(default=3, ge=0)
    """Held-out prompts logged with their scores at each evaluation."""
