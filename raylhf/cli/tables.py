"""Tables that several commands print."""

from collections.abc import Sequence

from rich.table import Table

from raylhf.config.base import Settings
from raylhf.config.placement import Role


def new_table(title: str, *columns: str) -> Table:
    """A table without lines: the first column of words, the others of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def roles_table(roles: Sequence[Role]) -> Table:
    """What each role asks of the cluster."""
    table = new_table("Roles", "role", "workers", "CPUs each", "GPUs each", "CPUs", "GPUs")
    for role in roles:
        cpus, gpus = role.replicas * role.num_cpus, role.replicas * role.num_gpus
        table.add_row(
            role.name, str(role.replicas), f"{role.num_cpus:g}", f"{role.num_gpus:g}", f"{cpus:g}", f"{gpus:g}"
        )
    cpus = sum(role.replicas * role.num_cpus for role in roles)
    gpus = sum(role.replicas * role.num_gpus for role in roles)
    table.add_row("all", str(sum(role.replicas for role in roles)), "", "", f"{cpus:g}", f"{gpus:g}")
    return table


def with_settings(settings: Settings) -> str:
    """The kind with its settings, in one line."""
    values = settings.model_dump()
    kind = values.pop("kind")
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{kind} ({shown})" if shown else kind
