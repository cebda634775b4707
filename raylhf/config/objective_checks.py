"""Whether the settings of a policy run's objective make sense together."""

from collections.abc import Iterator

from raylhf.config.objective import AdaptiveKLControl, CriticConfig, KLConfig, PPOConfig
from raylhf.config.preference_checks import check_online_dpo
from raylhf.config.problems import Problem, problem_at
from raylhf.config.run import RunConfig

GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "gdpo")
"""Advantage estimators whose baseline is the other responses to the same prompt."""


def check_objective(config: RunConfig) -> Iterator[Problem]:
    """Problems of the objective, whichever it is."""
    objective = config.objective
    if isinstance(objective, PPOConfig):
        yield from _check_advantage(objective, config)
        yield from _check_kl(objective.kl)
    else:
        yield from check_online_dpo(objective, config)


def _check_kl(kl: KLConfig) -> Iterator[Problem]:
    if kl.placement == "reward" and kl.estimator not in (None, "k1"):
        yield problem_at(
            "objective.kl.estimator",
            f"is {kl.estimator} with placement reward, where only k1 gives the gradient of the reverse KL (k2 and k3 "
            "in the reward are biased, 2506.09477); set it to k1 or null",
        )
    if kl.placement == "loss" and kl.estimator not in (None, "k2"):
        reason = (
            "k1 in the loss has zero expected gradient, which is no penalty at all"
            if kl.estimator == "k1"
            else "k3 in the loss has the gradient of the forward KL"
        )
        yield problem_at(
            "objective.kl.estimator",
            f"is {kl.estimator} with placement loss, where only k2 gives the gradient of the reverse KL: {reason} "
            "(2512.21852); set it to k2 or null (the logged value is k3 anyway)",
        )
    if not isinstance(kl.control, AdaptiveKLControl):
        return
    control = kl.control
    if kl.budget_per_sequence is not None and control.target_per_sequence > kl.budget_per_sequence:
        yield problem_at(
            "objective.kl.control.target_per_sequence",
            f"is {control.target_per_sequence}, above budget_per_sequence = {kl.budget_per_sequence}: the controller "
            "would steer the run into its own stop; lower the target or raise the budget",
        )
    if control.min_coef > control.max_coef:
        yield problem_at(
            "objective.kl.control.min_coef", f"is {control.min_coef}, more than max_coef = {control.max_coef}"
        )
    elif not control.min_coef <= kl.coef <= control.max_coef:
        yield problem_at(
            "objective.kl.coef",
            f"is {kl.coef}, outside of the control's [{control.min_coef}, {control.max_coef}]; start inside of it",
        )


def _check_advantage(objective: PPOConfig, config: RunConfig) -> Iterator[Problem]:
    group_size = config.rollout.group_size
    if objective.advantage in GROUP_ESTIMATORS and group_size < 2:
        yield problem_at(
            "rollout.group_size",
            f"is {group_size}, but objective.advantage: {objective.advantage} compares the responses to one prompt; "
            "set it to 2 or more (4 to 16 are usual)",
        )
    if objective.advantage in GROUP_ESTIMATORS and objective.gamma != 1:
        yield problem_at(
            "objective.gamma",
            f"is {objective.gamma}, but objective.advantage: {objective.advantage} credits whole responses; set it "
            "to 1",
        )
    if (objective.advantage == "gdpo") != bool(objective.gdpo_weights):
        yield problem_at(
            "objective.gdpo_weights",
            "and objective.advantage: gdpo go together: give the parts of the reward by name with their weights, or "
            "remove the weights",
        )
    if objective.advantage == "gdpo" and objective.kl.placement == "reward" and objective.kl.coef > 0:
        yield problem_at(
            "objective.kl.placement",
            "is reward, but objective.advantage: gdpo normalises the parts of the reward alone; set it to loss",
        )
    if objective.approx_kl_limit is not None and objective.num_epochs == 1:
        yield problem_at(
            "objective.approx_kl_limit",
            "stops epochs after the first one, but objective.num_epochs is 1; raise that, or set the limit to null",
        )
    if objective.advantage == "gae":
        yield from _check_critic(objective, config)
        return
    unused = "has no effect without a critic; remove it, or set objective.advantage: gae"
    for name in CriticConfig.model_fields:
        value = getattr(objective.critic, name)
        if value != getattr(CriticConfig(), name):
            yield problem_at(
                f"objective.critic.{name}",
                f"is {value}, but with objective.advantage: {objective.advantage} it {unused}",
            )
    if objective.gae_lambda != PPOConfig().gae_lambda:
        yield problem_at(
            "objective.gae_lambda",
            f"is {objective.gae_lambda}, but with objective.advantage: {objective.advantage} it {unused}",
        )
    if objective.bootstrap_truncated:
        yield problem_at(
            "objective.bootstrap_truncated",
            "is true, but the value at the cut comes from a critic; set it to false, or objective.advantage: gae",
        )


def _check_critic(objective: PPOConfig, config: RunConfig) -> Iterator[Problem]:
    critic = objective.critic
    if critic.trunk == "shared" and critic.path is not None:
        yield problem_at(
            "objective.critic.path",
            f"is {critic.path!r}, but trunk: shared puts the value head on the policy; set trunk: own, or path: null",
        )
    if critic.trunk == "own" and critic.loss_coef != CriticConfig().loss_coef:
        yield problem_at(
            "objective.critic.loss_coef",
            f"is {critic.loss_coef}, but a critic with its own trunk has its own optimizer, so the factor has no "
            "effect; remove it (critic.lr is the setting to change)",
        )
    if objective.bootstrap_truncated and config.reward.missing_eos_penalty > 0:
        yield problem_at(
            "objective.bootstrap_truncated",
            f"values what a cut response would go on to, while reward.missing_eos_penalty = "
            f"{config.reward.missing_eos_penalty:g} punishes it for being cut; set one of them to false or 0",
        )
    if critic.warmup_steps >= config.num_steps and critic.warmup_steps > 0:
        yield problem_at(
            "objective.critic.warmup_steps",
            f"is {critic.warmup_steps}, but the run has num_steps = {config.num_steps}: the policy would never learn; "
            "lower it",
        )
