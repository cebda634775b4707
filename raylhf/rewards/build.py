"""From settings to the reward graph."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from raylhf.config import reward as settings
from raylhf.config.reward_leaves import Leaf
from raylhf.rewards.answers import AnswerReward
from raylhf.rewards.fusion import (
    kl_dro,
    lower_confidence,
    tchebycheff,
    uncertainty_weighted,
    weighted_sum,
    worst_case,
)
from raylhf.rewards.library_rules import LanguageReward, SpellingReward, ToxicityReward, WritingReward
from raylhf.rewards.nodes import Adaptive, Combine
from raylhf.rewards.remote import RemoteReward
from raylhf.rewards.rules import (
    CharacterReward,
    FormatReward,
    FunctionReward,
    JsonReward,
    LengthReward,
    OverlongReward,
    RegexReward,
    RepetitionReward,
    SentimentReward,
)
from raylhf.rewards.selection import Gate, Route
from raylhf.rewards.source import Source
from raylhf.rewards.state import RewardState, scale_of
from raylhf.rewards.transforms import Calibrate, Clip, Veto, Whiten

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward


@dataclass(frozen=True)
class BuildContext:
    """What a graph is built with, besides its settings."""

    policy: str | None = None
    """Folder with the policy's tokenizer, in whose tokens dense scores are laid out; None makes no dense scores."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where reward models run."""
    batch_tokens: int = 16_384
    """Token budget of one forward pass of a reward model, padding included."""
    state: RewardState = field(default_factory=RewardState)
    """What the graph's nodes remember."""
    seed: int = 0
    """Of `tiny` models."""


@dataclass(frozen=True)
class Place:
    """Where in the graph something is built."""

    path: str
    """By settings, for the state: `graph.parts.helpful.reward`."""
    name: str
    """By part names, for logs: `helpful/quality`; empty at the top."""
    num_vetoes: int = 0
    """Vetoes above it that share its name; their rules are named `rule`, `rule_2`..."""

    def part(self, name: str) -> "Place":
        """The reward of a named part."""
        return Place(f"{self.path}.parts.{name}.reward", f"{self.name}/{name}".removeprefix("/"))

    @property
    def reward(self) -> "Place":
        """The one reward of a node without parts, which has no name of its own."""
        return replace(self, path=f"{self.path}.reward")


def build_reward(config: settings.RewardConfig, context: BuildContext | None = None) -> "Reward":
    """The leaf or node that the settings describe, with everything below it. A ValueError says what cannot be built."""
    return _build(config, context or BuildContext(), Place(path="graph", name=""))


def _build(config: settings.RewardConfig, context: BuildContext, place: Place) -> "Reward":
    if isinstance(config, Leaf):
        reward = LEAF_BUILDERS[config.kind](config, context)
        return Source(place.name or config.kind, reward, config.on_failure, context.state)
    return NODE_BUILDERS[config.kind](config, context, place)


def build_rule(config: Any, context: BuildContext) -> "Reward":
    """A leaf whose constructor takes its settings and nothing else."""
    names = type(config).model_fields.keys() - {"kind", "on_failure"}
    return RULES[config.kind](**{name: getattr(config, name) for name in names})


def build_model(config: Any, context: BuildContext) -> "Reward":
    """A leaf that is a model; torch is loaded here."""
    from raylhf.rewards import model_leaves

    models = {
        "explicit": model_leaves.ExplicitModelReward,
        "token_level": model_leaves.TokenLevelModelReward,
        "process": model_leaves.ProcessModelReward,
        "ensemble": model_leaves.EnsembleModelReward,
        "multi_value": model_leaves.MultiValueModelReward,
        "implicit": model_leaves.ImplicitModelReward,
    }
    return models[config.kind](config, context)


def build_sum(config: settings.SumReward, context: BuildContext, place: Place) -> "Reward":
    weights = [part.weight for part in config.parts]
    return Combine(build_parts(config.parts, context, place), partial(weighted_sum, weights=weights))


def build_min(config: settings.MinReward, context: BuildContext, place: Place) -> "Reward":
    return Combine(build_parts(config.parts, context, place), worst_case, by_member=True)


def build_lower_confidence(config: settings.LowerConfidenceReward, context: BuildContext, place: Place) -> "Reward":
    return Combine(
        build_parts(config.parts, context, place), partial(lower_confidence, coef=config.coef), by_member=True
    )


def build_uncertainty_weighted(
    config: settings.UncertaintyWeightedReward, context: BuildContext, place: Place
) -> "Reward":
    return Combine(
        build_parts(config.parts, context, place), partial(uncertainty_weighted, coef=config.coef), by_member=True
    )


def build_kl_dro(config: settings.KLDROReward, context: BuildContext, place: Place) -> "Reward":
    return Combine(build_parts(config.parts, context, place), partial(kl_dro, beta=config.beta), by_member=True)


def build_tchebycheff(config: settings.TchebycheffReward, context: BuildContext, place: Place) -> "Reward":
    if len(config.ideal) != len(config.parts):
        raise ValueError(f"{place.path}.ideal has {len(config.ideal)} values for {len(config.parts)} parts")
    weights = [part.weight for part in config.parts]
    combine = partial(tchebycheff, weights=weights, ideal=config.ideal)
    return Combine(build_parts(config.parts, context, place), combine)


def build_gate(config: settings.GateReward, context: BuildContext, place: Place) -> "Reward":
    classifier = None
    if config.path is not None:
        from raylhf.rewards.model_leaves import PromptClassifier

        classifier = PromptClassifier(
            config.path, temperature=config.temperature, num_outputs=len(config.parts), context=context
        )
    return Gate(
        build_parts(config.parts, context, place),
        [part.weight for part in config.parts],
        weights_key=config.weights_key,
        rules=[(rule.pattern, rule.weights) for rule in config.rules],
        classifier=classifier,
    )


def build_adaptive(config: settings.AdaptiveReward, context: BuildContext, place: Place) -> "Reward":
    weights = [part.weight for part in config.parts]
    parts = build_parts(config.parts, context, place)
    return Adaptive(parts, weights, decay=config.decay, place=place.path, state=context.state)


def build_route(config: settings.RouteReward, context: BuildContext, place: Place) -> "Reward":
    parts = build_parts(config.parts, context, place)
    rules = [(rule.pattern, rule.part) for rule in config.rules]
    return Route(parts, key=config.key, rules=rules, default=config.default)


def build_veto(config: settings.VetoReward, context: BuildContext, place: Place) -> "Reward":
    below = replace(place.reward, num_vetoes=place.num_vetoes + 1)
    rule_name = "rule" if place.num_vetoes == 0 else f"rule_{below.num_vetoes}"
    rule = Place(f"{place.path}.rule", f"{place.name}/{rule_name}".removeprefix("/"))
    return Veto(
        _build(config.reward, context, below),
        _build(config.rule, context, rule),
        rule_name=rule_name,
        below=config.below,
        cap=config.cap,
    )


def build_calibrate(config: settings.CalibrateReward, context: BuildContext, place: Place) -> "Reward":
    reward = _build(config.reward, context, place.reward)
    if config.source == "given":
        return Calibrate(reward, mean=config.mean, std=config.std)
    if config.source == "reference":
        return Whiten(reward, place=place.path, state=context.state, is_reference=True)
    calibration = getattr(reward, "calibration", None)
    if calibration is None:
        raise ValueError(
            f"{place.path}.source is model, but the {config.reward.kind} reward below it has no calibration; give it a "
            "reward model's folder with a calibration file, or set source: reference or given"
        )
    mean, std = float(calibration.mean[0]), scale_of(float(calibration.std[0]))
    if not config.clip_to_quantiles:
        return Calibrate(reward, mean=mean, std=std)
    return Calibrate(reward, mean=mean, std=std, low=float(calibration.q01[0]), high=float(calibration.q99[0]))


def build_whiten(config: settings.WhitenReward, context: BuildContext, place: Place) -> "Reward":
    reward = _build(config.reward, context, place.reward)
    return Whiten(reward, place=place.path, state=context.state, decay=config.decay, shift_mean=config.shift_mean)


def build_clip(config: settings.ClipReward, context: BuildContext, place: Place) -> "Reward":
    return Clip(_build(config.reward, context, place.reward), low=config.low, high=config.high)


def build_parts(parts: Sequence[settings.Part], context: BuildContext, place: Place) -> dict[str, "Reward"]:
    """The rewards of a node's parts by name."""
    repeated = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if repeated:
        raise ValueError(f"the parts of a node must have names of their own in logs; {', '.join(repeated)} is repeated")
    return {part.name: _build(part.reward, context, place.part(part.name)) for part in parts}


def can_be_dense(config: settings.RewardConfig) -> bool:
    """Whether some leaf gives token scores where there is a policy to lay them out for."""
    return any(
        node.kind in DENSE_KINDS or (isinstance(node, settings.ImplicitReward) and node.form == "token")
        for _, node in settings.walk(config, "")
    )


DENSE_KINDS = ("token_level", "process")
RULES: dict[str, Callable[..., "Reward"]] = {
    "sentiment": SentimentReward,
    "length": LengthReward,
    "overlong": OverlongReward,
    "format": FormatReward,
    "repetition": RepetitionReward,
    "regex": RegexReward,
    "json": JsonReward,
    "language": LanguageReward,
    "spelling": SpellingReward,
    "writing": WritingReward,
    "toxicity": ToxicityReward,
    "answer": AnswerReward,
    "function": FunctionReward,
    "characters": CharacterReward,
    "remote": RemoteReward,
}
MODELS = ("explicit", "token_level", "process", "ensemble", "multi_value", "implicit")
LEAF_BUILDERS: dict[str, Callable[[Any, BuildContext], "Reward"]] = {
    **dict.fromkeys(RULES, build_rule),
    **dict.fromkeys(MODELS, build_model),
}
NODE_BUILDERS: dict[str, Callable[[Any, BuildContext, Place], "Reward"]] = {
    "sum": build_sum,
    "min": build_min,
    "lower_confidence": build_lower_confidence,
    "uncertainty_weighted": build_uncertainty_weighted,
    "kl_dro": build_kl_dro,
    "tchebycheff": build_tchebycheff,
    "gate": build_gate,
    "adaptive": build_adaptive,
    "route": build_route,
    "veto": build_veto,
    "calibrate": build_calibrate,
    "whiten": build_whiten,
    "clip": build_clip,
}
REWARD_BUILDERS = {**LEAF_BUILDERS, **NODE_BUILDERS}
"""Every kind of the settings."""
