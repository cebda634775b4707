"""The reward graph: leaves score responses, nodes combine scores."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from raylhf.config.base import Settings
from raylhf.config.cluster import PlacementStrategy
from raylhf.config.reward_leaves import (
    AnswerReward,
    CharacterReward,
    EnsembleReward,
    ExplicitReward,
    FormatReward,
    FunctionReward,
    ImplicitReward,
    JsonReward,
    LanguageReward,
    LengthReward,
    MultiValueReward,
    OverlongReward,
    ProcessReward,
    RegexReward,
    RemoteReward,
    RepetitionReward,
    SentimentReward,
    SpellingReward,
    TokenLevelReward,
    ToxicityReward,
    WritingReward,
)


class Part(Settings):
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name under which the part is logged (`reward/part/NAME_mean`)."""
    reward: "RewardConfig"
    """A leaf or another node."""


class WeightedPart(Part):
    weight: float = 1.0
    """Factor of the part."""


class SumReward(Settings):
    """Weighted sum of its parts; invalid where any part is invalid."""

    kind: Literal["sum"]
    parts: tuple[WeightedPart, ...] = Field(min_length=1)
    """The summands."""


class MinReward(Settings):
    """The lowest part: worst-case optimisation (2310.02743). An ensemble or multi-value part counts by its members."""

    kind: Literal["min"]
    parts: tuple[Part, ...] = Field(min_length=1)
    """What is compared."""


class LowerConfidenceReward(Settings):
    """Mean of the parts minus `coef` standard deviations (ddof 1). An ensemble part counts by its members."""

    kind: Literal["lower_confidence"]
    parts: tuple[Part, ...] = Field(min_length=1)
    """Estimates of one quantity on one scale."""
    coef: float = Field(default=1.0, ge=0)
    """Standard deviations."""


class UncertaintyWeightedReward(Settings):
    """Mean of the parts minus `coef` variances (ddof 1): UWO (2310.02743). An ensemble part counts by its members."""

    kind: Literal["uncertainty_weighted"]
    parts: tuple[Part, ...] = Field(min_length=1)
    """Estimates of one quantity on one scale."""
    coef: float = Field(default=0.1, ge=0)
    """Weight of the variance (Coste et al.: 0.1 for PPO, 0.5 for best-of-n)."""


class KLDROReward(Settings):
    """-beta log mean exp(-r / beta) over the parts: their mean as beta grows, their minimum as it goes to 0."""

    kind: Literal["kl_dro"]
    parts: tuple[Part, ...] = Field(min_length=1)
    """Estimates of one quantity on one scale. An ensemble part counts by its members."""
    beta: float = Field(default=1.0, gt=0)
    """Temperature, in reward units."""


class TchebycheffReward(Settings):
    """-max_j weight_j |ideal - r_j|: reaches concave parts of a Pareto front, which a sum cannot."""

    kind: Literal["tchebycheff"]
    parts: tuple[WeightedPart, ...] = Field(min_length=1)
    """The objectives."""
    ideal: tuple[float, ...]
    """Best value of each part, in their order; a fixed estimate."""


class GateRule(Settings):
    pattern: str
    """Regular expression, searched in the prompt's last user turn."""
    weights: dict[str, float]
    """Weight of each part for such prompts; a part that is not named gets 0."""


class GateReward(Settings):
    """A sum whose weights depend on the prompt: a data field, a classifier of prompts, the first rule that matches."""

    kind: Literal["gate"]
    parts: tuple[WeightedPart, ...] = Field(min_length=1)
    """The summands, with the weights of prompts that nothing below speaks about."""
    weights_key: str | None = None
    """Field of the data row with a mapping of part names to weights; it comes first."""
    rules: tuple[GateRule, ...] = ()
    """Rules in order."""
    path: str | None = None
    """Sequence-classification model of the prompt with one output a part: softmax(outputs / temperature)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of that softmax (ArmoRM: 10)."""


class AdaptiveReward(Settings):
    """A sum whose parts are divided by their running standard deviations, so that no part rules by its scale alone."""

    kind: Literal["adaptive"]
    parts: tuple[WeightedPart, ...] = Field(min_length=1)
    """The summands; the weight is a part's share of the signal."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the running statistics, at each step."""


class RouteReward(Settings):
    """One of several rewards, by a field of the data row or by the first rule that the prompt matches."""

    kind: Literal["route"]
    key: str | None = None
    """Field of the data row whose value is the name of a part."""
    rules: tuple["RouteRule", ...] = ()
    """Rules in order; used where `key` is null or the row has no such field."""
    parts: tuple[Part, ...] = Field(min_length=1)
    """The rewards to choose from."""
    default: str | None = None
    """Name of the part for the rest; null makes their scores invalid."""


class RouteRule(Settings):
    pattern: str
    """Regular expression, searched in the prompt's last user turn."""
    part: str
    """Name of the part that scores such prompts."""


class VetoReward(Settings):
    """A rule that caps another reward: where the rule's score is below the threshold, the reward is at most `cap`."""

    kind: Literal["veto"]
    reward: "RewardConfig"
    """What is capped."""
    rule: "RewardConfig"
    """What may cap it."""
    below: float = 0.5
    """Threshold of the rule's score."""
    cap: float = 0.0
    """Highest score of a vetoed response. A finite cap keeps group baselines usable."""


class CalibrateReward(Settings):
    """(score - mean) / std with constants, then clipped to the calibration's quantiles if asked for."""

    kind: Literal["calibrate"]
    reward: "RewardConfig"
    """What is calibrated."""
    source: Literal["model", "reference", "given"] = "model"
    """`model`: the calibration file of the reward model below; `reference`: the untrained policy's held-out responses,
    scored before the first step and kept; `given`: mean and std below."""
    mean: float = 0.0
    """Subtracted (`given`)."""
    std: float = Field(default=1.0, gt=0)
    """Divided by (`given`)."""
    clip_to_quantiles: bool = False
    """Clip to the 1 % and 99 % quantiles of the calibration set (`model`)."""


class WhitenReward(Settings):
    """(score - running mean) / running std, over the responses of the steps so far; all workers share one state."""

    kind: Literal["whiten"]
    reward: "RewardConfig"
    """What is whitened."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the running moments, at each step."""
    shift_mean: bool = True
    """Subtract the mean too."""


class ClipReward(Settings):
    """The score, at least `low` and at most `high`."""

    kind: Literal["clip"]
    reward: "RewardConfig"
    """What is clipped."""
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""


LeafConfig = (
    SentimentReward
    | LengthReward
    | OverlongReward
    | FormatReward
    | RepetitionReward
    | RegexReward
    | JsonReward
    | LanguageReward
    | SpellingReward
    | WritingReward
    | ToxicityReward
    | AnswerReward
    | FunctionReward
    | CharacterReward
    | ExplicitReward
    | TokenLevelReward
    | ProcessReward
    | EnsembleReward
    | MultiValueReward
    | ImplicitReward
    | RemoteReward
)
NodeConfig = (
    SumReward
    | MinReward
    | LowerConfidenceReward
    | UncertaintyWeightedReward
    | KLDROReward
    | TchebycheffReward
    | GateReward
    | AdaptiveReward
    | RouteReward
    | VetoReward
    | CalibrateReward
    | WhitenReward
    | ClipReward
)
RewardConfig = Annotated[LeafConfig | NodeConfig, Field(discriminator="kind")]

for _model in (
    Part, WeightedPart, SumReward, MinReward, LowerConfidenceReward, UncertaintyWeightedReward, KLDROReward,
    TchebycheffReward, GateReward, AdaptiveReward, RouteReward, VetoReward, CalibrateReward, WhitenReward, ClipReward,
):  # fmt: skip
    _model.model_rebuild()


def walk(node: LeafConfig | NodeConfig, key: str) -> Iterator[tuple[str, LeafConfig | NodeConfig]]:
    """The node and everything below it, top down, each with its key in the settings."""
    yield key, node
    for i, part in enumerate(getattr(node, "parts", ())):
        yield from walk(part.reward, f"{key}.parts.{i}.reward")
    for name in ("reward", "rule"):
        if (child := getattr(node, name, None)) is not None:
            yield from walk(child, f"{key}.{name}")


class RewardPlaneConfig(Settings):
    graph: RewardConfig
    """The reward: one leaf, or a node over several."""
    replicas: int = Field(default=1, ge=1)
    """Reward workers."""
    num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves for one reward worker."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for one reward worker; reward models run there."""
    resources: dict[str, float] = {}
    """Further Ray resources that one worker reserves; custom ones pin it to the nodes that have them."""
    placement: PlacementStrategy = "PACK"
    """How Ray lays workers over nodes: PACK on few, SPREAD over many, STRICT_PACK on one, STRICT_SPREAD on one each."""
    threads: int = Field(default=1, ge=1)
    """Compute threads of one reward worker on a CPU."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Token budget of one forward pass of a reward model (padding included), over all requests that wait."""
    max_resamples: int = Field(default=2, ge=0)
    """How often a prompt's group is sampled anew where a leaf with `on_failure: resample` failed."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Subtracted from the score of a response that ran into max_response_tokens."""
    clip: float | None = Field(default=None, gt=0)
    """Clip scores (after the penalty) to [-clip, clip]; null leaves them."""

    @property
    def has_state(self) -> bool:
        """Whether scores depend on statistics of earlier responses, which all reward workers must share."""
        return any(
            isinstance(node, WhitenReward | AdaptiveReward)
            or (isinstance(node, CalibrateReward) and node.source == "reference")
            for _, node in walk(self.graph, "")
        )
