"""`raylhf check` of a run that trains a reward model."""

from rich.console import Console
from rich.table import Table

from raylhf.cli.tables import new_table, roles_table
from raylhf.config.base import Settings
from raylhf.config.placement import roles_of
from raylhf.config.reward_model import MultiValueHead
from raylhf.config.run import RewardModelRunConfig


def check_reward_model(console: Console, config: RewardModelRunConfig, *, with_data: bool) -> None:
    """Print what will be trained and, if asked for, what the data holds."""
    console.print(f"{config.name}: a reward model from {config.model.path}", style="bold", markup=False)
    console.print()
    console.print(roles_table(roles_of(config)))
    console.print()
    console.print(_objective(config))
    if with_data:
        console.print()
        console.print(_data(config))


def _objective(config: RewardModelRunConfig) -> Table:
    objective, learner = config.objective, config.learner
    table = new_table("Objective", "", "")
    table.columns[1].justify = "left"
    table.add_row("judgements", f"{config.data.kind} of {config.data.path}")
    table.add_row("loss", _with_settings(objective.loss))
    table.add_row("head", _with_settings(objective.head))
    if learner.lora is not None:
        trained = f"LoRA of rank {learner.lora.rank}, and the head"
    elif objective.trainable_layers is not None:
        trained = f"the top {objective.trainable_layers} layers, and the head"
    else:
        trained = "all weights"
    table.add_row("trained", trained)
    table.add_row("prompts in an optimizer step", f"{objective.batch_size}")
    table.add_row("passes", f"{objective.num_epochs}" if config.num_steps is None else f"{config.num_steps} steps")
    return table


def _with_settings(settings: Settings) -> str:
    values = settings.model_dump()
    kind = values.pop("kind")
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{kind} ({shown})" if shown else kind


def _data(config: RewardModelRunConfig) -> Table:
    from raylhf.text.data_report import data_report, lines
    from raylhf.text.judgements import load_split

    head = config.objective.head
    split = load_split(config.data, head, seed=config.seed)
    attributes = head.attributes if isinstance(head, MultiValueHead) else ()
    table = new_table("Data", "quantity", "number")
    for label, value in lines(data_report(split.train, split.held_out, loaded=split.sources, attributes=attributes)):
        table.add_row(label, value)
    return table
