"""The losses of preference optimisation. docs/algorithms.md has formula, paper and source of the defaults of each."""

from typing import Annotated, Literal

from pydantic import Field

from raylhf.config.base import Settings

Beta = Annotated[float, Field(gt=0)]


class DPOLoss(Settings):
    """-log sigmoid(beta * gap): 2305.18290."""

    kind: Literal["dpo"] = "dpo"
    beta: Beta = 0.1
    """Strength of the KL penalty that the loss stands for, in reward units per nat."""


class CDPOLoss(Settings):
    """DPO whose labels are wrong with a known probability (Mitchell 2023)."""

    kind: Literal["cdpo"]
    beta: Beta = 0.1
    """As of dpo."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """Probability that a label is wrong; a pair's `agreement` replaces it by 1 - agreement."""


class RobustDPOLoss(Settings):
    """An unbiased estimate of DPO's loss without the label noise; unbounded below: 2403.00409."""

    kind: Literal["robust_dpo"]
    beta: Beta = 0.1
    """As of dpo."""
    label_noise: float = Field(default=0.1, ge=0, lt=0.5)
    """Probability that a label is wrong."""


class IPOLoss(Settings):
    """A squared distance of the gap of mean log-ratios to 1 / (2 beta): 2310.12036."""

    kind: Literal["ipo"]
    beta: Beta = 0.1
    """The paper's tau; in units of a token's log-ratio."""


class SimPOLoss(Settings):
    """Mean log-probabilities without a reference: 2405.14734."""

    kind: Literal["simpo"]
    beta: Beta = 2.0
    """Scale of the mean log-probability."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin, in the loss's logit."""


class ORPOLoss(Settings):
    """Supervised fine-tuning on the chosen response plus an odds-ratio term, without a reference: 2403.07691."""

    kind: Literal["orpo"]
    odds_coef: float = Field(default=0.1, gt=0)
    """Weight of the odds-ratio term (the paper's lambda)."""


class KTOLoss(Settings):
    """Responses that are good or bad, each by itself, against the batch's KL: 2402.01306."""

    kind: Literal["kto"]
    beta: Beta = 0.1
    """As of dpo."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of good responses."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of bad responses; keep weight times number of both within a factor of 4/3."""
    good_from: float = 0.5
    """With data.kind scores: responses with this score or more are good, others bad."""


class BetaDPOLoss(Settings):
    """DPO with a beta for each batch, and the batch's outliers left out: 2407.08639."""

    kind: Literal["beta_dpo"]
    beta: Beta = 0.1
    """beta where the batch's mean gap is as usual."""
    sensitivity: float = Field(default=0.6, ge=0)
    """How much beta follows the batch's mean gap (the paper's alpha)."""
    filter_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of the pairs left out of each batch: drawn, those with unusual gaps rather (the paper's rho)."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean and deviation of the gap."""


class AlphaDPOLoss(Settings):
    """SimPO with a margin that follows the gap to the reference: 2410.10148."""

    kind: Literal["alpha_dpo"]
    beta: Beta = 10.0
    """Scale of the mean log-probability."""
    gamma_ratio: float = Field(default=0.4, ge=0)
    """Margin over beta."""
    alpha: float = Field(default=0.2, ge=0)
    """Weight of the standardised gap in the margin."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean and deviation of the gap."""


class TDPO1Loss(Settings):
    """DPO less the difference of the responses' forward KL over the whole vocabulary: 2404.11999."""

    kind: Literal["tdpo1"]
    beta: Beta = 0.1
    """As of dpo."""


class TDPO2Loss(Settings):
    """TDPO1 with a weight, and no gradient through the chosen response's KL: 2404.11999."""

    kind: Literal["tdpo2"]
    beta: Beta = 0.1
    """As of dpo."""
    alpha: float = Field(default=0.5, ge=0)
    """Weight of the KL difference."""


class TGDPOLoss(Settings):
    """DPO whose tokens are weighted by a guide's log-ratios: 2506.14574."""

    kind: Literal["tgdpo"]
    beta: Beta = 0.1
    """As of dpo."""
    alpha: float = Field(default=0.5, ge=0)
    """How much the guide weighs."""
    guide: str
    """Model whose log-ratio to the reference is the token reward: an earlier DPO or SimPO checkpoint."""


INSTRUCTION_TOKENS = 256
"""By how much T-REG's instruction may lengthen a prompt beyond data.max_tokens."""


class TREGLoss(Settings):
    """DPO with a pull on tokens that the reference itself prefers when it is asked for a better answer: 2412.02685."""

    kind: Literal["t_reg"]
    beta: Beta = 0.1
    """As of dpo."""
    alpha: float = Field(default=0.25, ge=0)
    """Weight of the token term."""
    better: str = "Answer as well as you can: correct, helpful and honest."
    """Put before the prompt's last turn to ask for a good answer."""
    worse: str = "Answer badly: wrong, unhelpful or dishonest."
    """Put before the prompt's last turn to ask for a bad answer."""


class StepDPOLoss(Settings):
    """DPO on the first step in which the responses differ: 2406.18629."""

    kind: Literal["step_dpo"]
    beta: Beta = 0.5
    """As of dpo."""
    step_separator: str = "\n\n"
    """What ends a step."""


class WDPOLoss(Settings):
    """DPO with a penalty on the loss's gradient in the input embeddings (Wasserstein robustness): 2502.01930."""

    kind: Literal["wdpo"]
    beta: Beta = 0.01
    """As of dpo."""
    rho: float = Field(default=0.01, ge=0)
    """Weight of the penalty."""


class KLDPOLoss(Settings):
    """DPO on the worst-case weighting of the batch's pairs (KL robustness): 2502.01930."""

    kind: Literal["kldpo"]
    beta: Beta = 0.01
    """As of dpo."""
    temperature: float = Field(default=0.05, gt=0)
    """Pairs weigh exp(loss / temperature), scaled to mean 1; small looks at the worst pairs alone."""


class DrDPOLoss(Settings):
    """DPO on the best-case weighting of the batch's pairs, against wrong labels: 2407.07880."""

    kind: Literal["dr_dpo"]
    beta: Beta = 0.1
    """As of dpo."""
    temperature: float = Field(default=1.0, gt=0)
    """Pairs weigh exp(-loss / temperature), scaled to mean 1 (the paper's beta')."""


class AuxDPOLoss(Settings):
    """DPO with a free offset for each response, kept near what the policy class cannot express: 2510.20413."""

    kind: Literal["aux_dpo"]
    beta: Beta = 0.1
    """As of dpo."""
    bound: float = Field(default=1.0, gt=0)
    """Largest offset, in nats."""
    offset_lr: float = Field(default=5e-3, gt=0)
    """Learning rate of the offsets (Adam)."""
    null_coef: float = Field(default=1.0, ge=0)
    """Weight of the offsets' part that the policy class can express."""
    amplitude_coef: float = Field(default=0.01, ge=0)
    """Reward for large offsets, against their collapse to 0."""


class MODPOLoss(Settings):
    """DPO on one objective with the others' rewards as a margin: 2310.03708."""

    kind: Literal["modpo"]
    beta: Beta = 0.1
    """As of dpo."""
    weight: float = Field(default=0.6, gt=0, le=1)
    """Weight of the objective that the pairs are about."""
    other_weights: dict[str, float] = Field(min_length=1)
    """Weights of the others, by their name in the rows' chosen_rewards and rejected_rewards."""


class NSDPOLoss(Settings):
    """DPO in which old pairs weigh less: 2407.18676."""

    kind: Literal["ns_dpo"]
    beta: Beta = 0.1
    """As of dpo."""
    gamma: float = Field(default=0.95, gt=0, le=1)
    """Weight of a pair of age 1, in units of the rows' `time`; the newest pair has age 0."""


class PlackettLuceDPOLoss(Settings):
    """DPO on rankings: the likelihood of the whole order (2305.18290, appendix A.3)."""

    kind: Literal["plackett_luce"]
    beta: Beta = 0.1
    """As of dpo."""


PreferenceLoss = Annotated[
    DPOLoss
    | CDPOLoss
    | RobustDPOLoss
    | IPOLoss
    | SimPOLoss
    | ORPOLoss
    | KTOLoss
    | BetaDPOLoss
    | AlphaDPOLoss
    | TDPO1Loss
    | TDPO2Loss
    | TGDPOLoss
    | TREGLoss
    | StepDPOLoss
    | WDPOLoss
    | KLDPOLoss
    | DrDPOLoss
    | AuxDPOLoss
    | MODPOLoss
    | NSDPOLoss
    | PlackettLuceDPOLoss,
    Field(discriminator="kind"),
]
