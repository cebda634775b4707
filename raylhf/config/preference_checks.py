"""Whether the settings of preference optimisation make sense together: above all, whether a loss gets what it needs."""

from collections.abc import Iterable, Iterator

from raylhf.config.algorithms import LOSSES, Need
from raylhf.config.preference import OnlineDPOConfig, ReferenceConfig
from raylhf.config.preference_losses import CDPOLoss, KTOLoss, PreferenceLoss
from raylhf.config.problems import Problem, problem_at
from raylhf.config.reward_leaves import ProcessReward
from raylhf.config.run import CommonConfig, RunConfig


def check_online_dpo(objective: OnlineDPOConfig, config: RunConfig) -> Iterator[Problem]:
    """Problems of online preference optimisation."""
    kind, pairs, group_size = objective.loss.kind, objective.pairs, config.rollout.group_size
    if group_size < 2:
        yield problem_at(
            "rollout.group_size",
            f"is {group_size}, but objective.kind: online_dpo compares the responses to one prompt; set it to 2 or "
            "more (2 to 8 are usual)",
        )
    if offline := LOSSES[kind].needs & {Need.TIME, Need.REWARD_GAPS, Need.STABLE_INDEX, Need.REFERENCE_PROMPTS}:
        yield problem_at(
            "objective.loss.kind",
            f"is {kind}, which needs {listed(offline)}: stored judgements have that, fresh responses do not; use "
            "objective.kind: preference, or another loss",
        )
    if kind == "step_dpo" and pairs.kind != "first_wrong_step":
        yield problem_at(
            "objective.loss.kind",
            "is step_dpo, which online is dpo with objective.pairs.kind: first_wrong_step; set both so",
        )
    if kind == "plackett_luce" and pairs != type(pairs)(tie_margin=pairs.tie_margin):
        yield problem_at("objective.pairs", "has no effect with plackett_luce, which ranks whole groups; remove it")
    if kind == "kto" and pairs != pairs.model_copy(update={"full_weight_gap": None, "weight_by_agreement": False}):
        yield problem_at(
            "objective.pairs",
            "weighs pairs, which has no effect with kto, a loss of single responses; remove full_weight_gap and "
            "weight_by_agreement",
        )
    if pairs.kind == "first_wrong_step" and pairs != type(pairs)(kind=pairs.kind):
        yield problem_at(
            "objective.pairs",
            "has settings about scores, but first_wrong_step compares steps; remove everything but the kind",
        )
    if pairs.kind == "first_wrong_step":
        yield from _check_steps(config)
    compares_parts = pairs.kind == "pareto" or pairs.weight_by_agreement
    if compares_parts and len(set(pairs.parts)) < 2:
        yield problem_at(
            "objective.pairs.parts",
            f"has {len(set(pairs.parts))} names, but {'pareto' if pairs.kind == 'pareto' else 'weight_by_agreement'} "
            "compares by two or more parts of the reward; name them (raylhf check prints the graph)",
        )
    if pairs.parts and not compares_parts and kind not in ("kto", "plackett_luce"):
        yield problem_at("objective.pairs.parts", "has no effect without pareto or weight_by_agreement; remove it")
    if pairs.soft_labels:
        yield from _check_soft_labels(objective)
    if isinstance(objective.loss, KTOLoss) and "good_from" in objective.loss.model_fields_set:
        yield problem_at(
            "objective.loss.good_from",
            "has no effect on fresh responses, of which those are good that win more pairs than they lose; remove it",
        )
    groups, minibatches = config.rollout.prompts_per_step // config.learner.num_ranks, objective.num_minibatches
    if groups % minibatches:
        yield problem_at(
            "objective.num_minibatches",
            f"is {minibatches}, which does not divide the {groups} prompts of a rank, whose responses stay together; "
            "lower it, or raise rollout.prompts_per_step",
        )
    yield from check_needs(objective.loss, config)
    yield from check_reference(objective.reference, objective.loss, config)


def _check_soft_labels(objective: OnlineDPOConfig) -> Iterator[Problem]:
    loss = objective.loss
    if not isinstance(loss, CDPOLoss):
        yield problem_at(
            "objective.pairs.soft_labels",
            f"is true, but the loss {loss.kind} takes every label for sure; set objective.loss.kind: cdpo, or remove "
            "it",
        )
    elif "label_smoothing" in loss.model_fields_set:
        yield problem_at(
            "objective.loss.label_smoothing",
            "has no effect with objective.pairs.soft_labels, which says how sure each label is; remove one",
        )
    if objective.pairs.tie_margin > 0:
        yield problem_at(
            "objective.pairs.tie_margin",
            f"is {objective.pairs.tie_margin:g}, but with soft_labels a tie is a pair that could go either way; remove "
            "it",
        )


def _check_steps(config: RunConfig) -> Iterator[Problem]:
    """Scores of steps can be told from what else a reward puts on tokens only where it is all there is."""
    graph, reward = config.reward.graph, config.reward
    if not isinstance(graph, ProcessReward) or graph.aggregate not in ("min", "mean"):
        yield problem_at(
            "reward.graph",
            "must be one leaf of kind process with aggregate min or mean for objective.pairs.kind: first_wrong_step, "
            "which reads the steps' own scores; change one",
        )
    if reward.missing_eos_penalty > 0 or reward.clip is not None:
        yield problem_at(
            "reward.missing_eos_penalty" if reward.missing_eos_penalty > 0 else "reward.clip",
            "changes the score of a response's last step, which objective.pairs.kind: first_wrong_step would take for "
            "wrong; set missing_eos_penalty to 0 and clip to null",
        )


def check_needs(loss: PreferenceLoss, config: CommonConfig) -> Iterator[Problem]:
    """Settings that cannot serve a loss are refused, never worked around in silence."""
    needs, learner = LOSSES[loss.kind].needs, config.learner
    partitioned = needs & {Need.FULL_VOCABULARY_KL, Need.DOUBLE_BACKWARD, Need.PER_SAMPLE_GRADIENTS}
    if partitioned and learner.zero_stage == 3:
        yield problem_at(
            "learner.zero_stage",
            f"is 3, but the loss {loss.kind} needs {listed(partitioned)}, for which the weights must be whole; set it "
            "to 2 or less",
        )
    if Need.DOUBLE_BACKWARD in needs and config.model.attention != "eager":
        yield problem_at(
            "model.attention",
            f"is {config.model.attention}, but the loss {loss.kind} needs {Need.DOUBLE_BACKWARD}, which fused "
            "attention does not have; set it to eager",
        )
    if Need.DOUBLE_BACKWARD in needs and learner.gradient_checkpointing:
        yield problem_at(
            "learner.gradient_checkpointing",
            f"is true, but the loss {loss.kind} needs {Need.DOUBLE_BACKWARD}, which it does not go with; set it to "
            "false",
        )
    if Need.PER_SAMPLE_GRADIENTS in needs and learner.lora is not None:
        yield problem_at(
            "learner.lora",
            f"is set, but the loss {loss.kind} needs {Need.PER_SAMPLE_GRADIENTS} of the reference, which with LoRA has "
            "no trained weights; set it to null",
        )


def check_reference(reference: ReferenceConfig, loss: PreferenceLoss, config: CommonConfig) -> Iterator[Problem]:
    """A reference that cannot move is not asked to."""
    if Need.REFERENCE not in LOSSES[loss.kind].needs and reference != ReferenceConfig():
        yield problem_at("objective.reference", f"has no effect: the loss {loss.kind} has no reference; remove it")
        return
    if reference.every_steps == 0 and reference.mix != 1:
        yield problem_at("objective.reference.mix", "has no effect with every_steps: 0; set that, or remove it")
    if reference.every_steps == 0:
        return
    if reference.mix < 1 and config.model.dtype == "bfloat16":
        yield problem_at(
            "objective.reference.mix",
            f"is {reference.mix:g}, but model.dtype: bfloat16 rounds so small a move of the reference away; set mix to "
            "1 and raise every_steps, or dtype to float32",
        )
    if config.learner.lora is not None:
        yield problem_at(
            "objective.reference.every_steps",
            "is set, but with learner.lora the reference is the model without its adapters, which cannot move; set it "
            "to 0, or lora to null",
        )
    if config.learner.zero_stage == 3:
        yield problem_at(
            "objective.reference.every_steps",
            "is set, but under learner.zero_stage: 3 no rank holds policy and reference whole; set the stage to 2 or "
            "less, or this to 0",
        )


def listed(names: Iterable[object]) -> str:
    """The names in words."""
    words = sorted(str(name) for name in names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
