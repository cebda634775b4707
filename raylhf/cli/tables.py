"""Tables that several commands print."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from raylhf.config.base import Settings
from raylhf.config.memory import GIB
from raylhf.config.placement import Role
from raylhf.config.plan import Plan
from raylhf.config.run import AnyRunConfig


def new_table(title: str, *columns: str) -> Table:
    """A table without lines: the first column of words, the others of numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
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


def print_memory(console: Console, config: AnyRunConfig, plan: Plan) -> None:
    """What each worker needs at its peak, and what does not fit."""
    console.print()
    if not plan.memory:
        console.print("Memory: unknown (model is not local, and not one whose shape is known by name)")
        return
    console.print("Memory of one worker at its peak, GiB (an estimate; raylhf plan has its items)", style="bold")
    table = new_table("", "role", "GPU", "host")
    for estimate in plan.memory:
        device = f"{estimate.device_bytes / GIB:.2f}" if estimate.device else ""
        table.add_row(estimate.role, device, f"{estimate.host_bytes / GIB:.2f}")
    cluster = config.cluster
    gpu = f"{plan.gpu_peak_bytes / GIB:.1f} of {cluster.gpu_memory_gib:g}" if cluster.gpus_per_node else ""
    table.add_row("fullest GPU, node", gpu, f"{plan.host_peak_bytes / GIB:.1f} of {cluster.host_memory_gib:g}")
    console.print(table)
    tokens = (
        "" if plan.kv_cache_tokens is None else f"; an engine's KV cache holds about {plan.kv_cache_tokens:,} tokens"
    )
    console.print(f"{plan.parameters:,} parameters, {plan.trained_parameters:,} trained{tokens}")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
