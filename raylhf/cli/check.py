"""`raylhf check`: the resolved plan of a run, or what a reward service will serve."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from raylhf.cli.reward_tree import grow
from raylhf.cli.tables import new_table, print_memory, roles_table, with_settings
from raylhf.config.errors import ConfigError
from raylhf.config.load import load_any_config
from raylhf.config.objective import AdaptiveKLControl, CriticConfig, PPOConfig
from raylhf.config.plan import BatchPlan, Plan, plan_batch, resolve_plan
from raylhf.config.preference import OnlineDPOConfig
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.run import OfflineRunConfig, RunConfig
from raylhf.config.service import ServiceConfig, load_service_config
from raylhf.config.source import read_source


def run_check(path: str, overrides: Sequence[str], *, with_data: bool) -> int:
    """Print the plan. Problems stop the loading with a ConfigError; a warning about memory does not.

    `with_data` reads stored judgements as well and tells what is in them. A file of Kubernetes manifests is checked as
    such.
    """
    if (text := _manifests_in(path)) is not None:
        from raylhf.launch.manifest_checks import find_manifest_problems, unchecked_kinds

        if problems := find_manifest_problems(text):
            raise ConfigError([f"{path}: {problem}" for problem in problems])
        unchecked = unchecked_kinds(text)
        print("no problems found" + (f" (not checked: {', '.join(unchecked)})" if unchecked else ""))
        return 0
    config = load_service_config(path, overrides) if _is_service(path) else load_any_config(path, overrides)
    console = Console(highlight=False, soft_wrap=True)
    if isinstance(config, OfflineRunConfig):
        from raylhf.cli.check_offline import check_offline

        try:
            check_offline(console, config, with_data=with_data)
        except ValueError as error:  # a row that cannot be read: its sentence is the whole message
            raise ConfigError([str(error)]) from error
    else:
        if with_data:
            raise ConfigError([f"{path}: --data reads stored judgements, and there are none in this file"])
        if isinstance(config, ServiceConfig):
            _check_service(console, config)
        else:
            _check_policy(console, config)
    console.print("\nno problems found", style="green")
    return 0


def _manifests_in(path: str) -> str | None:
    """The text of the file, if that is manifests."""
    from raylhf.launch.manifest_checks import is_manifest

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # the sentence is that of the config's reader
        return None
    return text if is_manifest(text) else None


def _is_service(path: str) -> bool:
    """Whether the file has a reward, and no section that only a run has."""
    sections = read_source(path, ()).data.keys()
    return "reward" in sections and sections <= ServiceConfig.model_fields.keys()


def _check_service(console: Console, config: ServiceConfig) -> None:
    console.print("a reward service (raylhf serve-reward)", style="bold")
    table = Table(title="Server", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    for name, value in {**config.serve.model_dump(), "max_replicas": config.max_replicas}.items():
        table.add_row(name, "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value))
    for part in (_reward(config.reward), table):
        console.print()
        console.print(part)
    for note in config.notes:
        console.print(f"\nnote: {note}", style="yellow", markup=False)


def _check_policy(console: Console, config: RunConfig) -> None:
    plan = resolve_plan(config)
    console.print(f"{config.name}: {config.num_steps} steps of {config.model.path}", style="bold", markup=False)
    for part in (roles_table(plan.roles), _batch(plan_batch(config)), _reward(config.reward), _objective(config, plan)):
        console.print()
        console.print(part)
    print_memory(console, config, plan)


def _batch(batch: BatchPlan) -> Table:
    table = new_table("Batch", "quantity", "number")
    rows = {
        "prompts per step": batch.prompts_per_step,
        "responses per step": batch.responses_per_step,
        "responses per learner rank": batch.responses_per_rank,
        "responses per rank and minibatch": batch.responses_per_minibatch,
        "micro-batches per minibatch": batch.micro_batches_per_minibatch,
        "optimizer steps per rollout batch": batch.optimizer_steps_per_rollout,
        "optimizer steps of the run (at most)": batch.total_optimizer_steps,
        "sampled tokens per step (at most)": batch.sampled_tokens_per_step,
        "prompt and response tokens per step (at most)": batch.tokens_per_step,
    }
    for name, number in rows.items():
        table.add_row(name, f"{number:,}")
    return table


def _reward(config: RewardPlaneConfig) -> Tree:
    tree = Tree("Reward", style="bold", guide_style="not bold")
    grow(tree, config.graph, "")
    penalty = config.missing_eos_penalty
    tree.add(f"minus {penalty:g} where the response ran into max_response_tokens", style="not bold")
    if config.clip is not None:
        tree.add(f"clipped to [-{config.clip:g}, {config.clip:g}]", style="not bold")
    return tree


def _objective(config: RunConfig, plan: Plan) -> Table:
    objective = config.objective
    table = Table(
        title="Objective", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    rows = _ppo(objective, config, plan) if isinstance(objective, PPOConfig) else _online_dpo(objective)
    for label, value in rows:
        table.add_row(label, value)
    budget = config.kl_budget
    table.add_row("KL budget", "none" if budget is None else f"{budget:g} nats per response, then the run stops")
    table.add_row("weight transfer", plan.weight_transfer)
    return table


def _ppo(objective: PPOConfig, config: RunConfig, plan: Plan) -> Iterator[tuple[str, str]]:
    kl = objective.kl
    estimator = kl.estimator or {"reward": "k1", "loss": "k2"}[kl.placement]
    yield "advantage", objective.advantage + (f", {_critic(config.critic, plan)}" if config.critic else "")
    yield "KL penalty", f"{kl.coef:g} x {estimator} in the {kl.placement}"
    if isinstance(kl.control, AdaptiveKLControl):
        target, horizon = kl.control.target_per_sequence, kl.control.horizon
        yield "KL control", f"adaptive towards {target:g} nats per response over {horizon:g} responses"
    else:
        yield "KL control", "fixed"


def _online_dpo(objective: OnlineDPOConfig) -> Iterator[tuple[str, str]]:
    yield "loss", with_settings(objective.loss)
    yield "pairs", with_settings(objective.pairs)
    reference = objective.reference
    moves = f"moves by {reference.mix:g} every {reference.every_steps} steps" if reference.every_steps else "fixed"
    yield "reference", moves


def _critic(critic: CriticConfig, plan: Plan) -> str:
    if critic.trunk == "shared":
        return "value head on the policy's trunk"
    size = "size unknown" if plan.critic_parameters is None else f"{plan.critic_parameters:,} parameters"
    return f"critic of its own from {critic.path or 'the policy'} ({size})"
