"""`raylhf check` of a run on stored judgements."""

from rich.console import Console
from rich.table import Table

from raylhf.cli.tables import new_table, print_memory, roles_table, with_settings
from raylhf.config.placement import roles_of
from raylhf.config.plan import resolve_plan
from raylhf.config.preference import PreferenceConfig, SFTConfig, loss_of
from raylhf.config.reward_model import MultiValueHead, RewardModelConfig
from raylhf.config.run import OfflineRunConfig, PreferenceRunConfig, RewardModelRunConfig


def check_offline(console: Console, config: OfflineRunConfig, *, with_data: bool) -> None:
    """Print what will be trained and, if asked for, what the data holds."""
    what = "a reward model" if isinstance(config, RewardModelRunConfig) else "a policy"
    console.print(f"{config.name}: {what} from {config.model.path}", style="bold", markup=False)
    console.print()
    console.print(roles_table(roles_of(config)))
    console.print()
    console.print(_objective(config))
    print_memory(console, config, resolve_plan(config))
    if with_data:
        console.print()
        console.print(_data(config))


def _objective(config: OfflineRunConfig) -> Table:
    objective, learner = config.objective, config.learner
    table = new_table("Objective", "", "")
    table.columns[1].justify = "left"
    table.add_row("judgements", f"{config.data.kind} of {config.data.path}")
    if isinstance(objective, SFTConfig):
        table.add_row("loss", "negative log-probability of the response tokens (sft)")
    else:
        table.add_row("loss", with_settings(objective.loss))
    is_reward_model = isinstance(objective, RewardModelConfig)
    and_head = ", and the head" if is_reward_model else ""
    trained = "all weights" if learner.lora is None else f"LoRA of rank {learner.lora.rank}{and_head}"
    if is_reward_model:
        table.add_row("head", with_settings(objective.head))
        if objective.trainable_layers is not None:
            trained = f"the top {objective.trainable_layers} layers, and the head"
    if isinstance(objective, PreferenceConfig) and objective.reference.every_steps:
        moved = objective.reference
        table.add_row("reference", f"moves every {moved.every_steps} steps, by {moved.mix:g} of the way")
    table.add_row("tokens in one pass", f"{learner.micro_batch_tokens} at most")
    table.add_row("trained", trained)
    table.add_row("prompts in an optimizer step", f"{objective.batch_size}")
    table.add_row("passes", f"{objective.num_epochs}" if config.num_steps is None else f"{config.num_steps} steps")
    return table


def _data(config: OfflineRunConfig) -> Table:
    from raylhf.text.data_report import data_report, lines
    from raylhf.text.judgements import load_split
    from raylhf.text.preference_data import usable_parts

    head = config.objective.head if isinstance(config, RewardModelRunConfig) else None
    split = load_split(config.data, head, seed=config.seed)
    attributes = head.attributes if isinstance(head, MultiValueHead) else ()
    table = new_table("Data", "quantity", "number")
    if isinstance(config, PreferenceRunConfig):
        train, held_out = usable_parts(split, loss_of(config.objective))
        table.add_row(f"prompts that {config.objective.kind} learns from", f"{len(train)} of {len(split.train)}")
        table.add_row("prompts that it is measured on", f"{len(held_out)} of {len(split.held_out)}")
    for label, value in lines(data_report(split.train, split.held_out, loaded=split.sources, attributes=attributes)):
        table.add_row(label, value)
    return table
