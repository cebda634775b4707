"""`raylhf plan`: memory by role, phase and item, the parts of a step's time, and what would make a run fit."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from rich.console import Console
from rich.table import Table

from raylhf.cli.tables import new_table, roles_table
from raylhf.config.devices import DEVICES, Device, measure_cpu
from raylhf.config.errors import ConfigError
from raylhf.config.load import load_any_config
from raylhf.config.memory import GIB, MemoryEstimate
from raylhf.config.plan import Plan, device_of, resolve_plan
from raylhf.config.run import AnyRunConfig, RunConfig
from raylhf.config.source import read_source
from raylhf.config.step_time import step_seconds
from raylhf.config.workload import longest_row, tokens_in_pass

WIDTH = 100
GPUS_PER_NODE = 8
"""Of a node of a larger cluster, where the settings do not say."""
MOST_TRIED = 20
"""Numbers of workers that are tried where those asked for find no room."""


def run_plan(
    path: str,
    overrides: Sequence[str],
    *,
    gpus: int | None,
    gpu_memory: float | None,
    device: str | None,
    measure: bool,
) -> int:
    """Print the plan.

    Raises:
        ConfigError: the settings are wrong, the model's shape is not known, or the run does not fit.
    """
    config = _load(path, [*overrides, *_cluster(path, overrides, gpus, gpu_memory)])
    found = DEVICES[device] if device else device_of(config)
    if measure:
        if config.learner.num_gpus or device:
            raise ConfigError(
                ["--measure times this machine's CPU; leave it out with --device or with a learner on GPUs"]
            )
        found = measure_cpu()
    plan = resolve_plan(config, found)
    if not plan.memory:
        raise ConfigError([f"{path}: {_unknown(config)}"])
    console = Console(highlight=False, width=WIDTH)
    _print(console, config, plan, found)
    if fatal := [w for w, s in zip(plan.warnings, plan.shortages, strict=True) if s.is_fatal]:
        raise ConfigError([f"{path}: {text}" for text in fatal])
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if not plan.warnings:
        console.print("\nit fits", style="green")
    return 0


def _load(path: str, overrides: Sequence[str]) -> AnyRunConfig:
    """The settings; where the roles find no room, the error names numbers of workers that do (tried)."""
    try:
        return load_any_config(path, overrides)
    except ConfigError as error:
        if not any("the roles ask for" in problem for problem in error.problems):
            raise
        for ranks, replicas in _fewer_workers(path, overrides):
            fewer = [f"learner.num_ranks={ranks}", *([f"rollout.replicas={replicas}"] if replicas else [])]
            if _is_sound(path, [*overrides, *fewer]):
                raise ConfigError([*error.problems, f"{path}: with {' '.join(fewer)} there is room"]) from None
        raise


def _is_sound(path: str, overrides: Sequence[str]) -> bool:
    with suppress(ConfigError):
        load_any_config(path, overrides)
        return True
    return False


def _fewer_workers(path: str, overrides: Sequence[str]) -> list[tuple[int, int]]:
    """Numbers of learner ranks and of engines (0: the run has none) that the GPUs suffice for, the most first."""
    source = read_source(path, overrides)

    def number(*key: str, default: float) -> float:
        value = source.value(key)
        return value if isinstance(value, int | float) else default

    ranks, has_rollout = int(number("learner", "num_ranks", default=1)), source.value(("rollout",)) is not None
    replicas = int(number("rollout", "replicas", default=1)) if has_rollout else 0
    each = number("learner", "num_gpus", default=0), number("rollout", "num_gpus", default=0)
    there_are = number("cluster", "gpus_per_node", default=0) * number("cluster", "num_nodes", default=1)
    pairs = [(n, m) for n in range(1, ranks + 1) for m in range(min(1, replicas), replicas + 1)]
    enough = [(n, m) for n, m in pairs if n * each[0] + m * each[1] <= there_are]
    return sorted(enough, key=lambda pair: (-sum(pair), pair))[:MOST_TRIED]


def _cluster(path: str, overrides: Sequence[str], gpus: int | None, gpu_memory: float | None) -> Iterator[str]:
    """The options as overrides."""
    if gpu_memory is not None:
        yield f"cluster.gpu_memory_gib={gpu_memory:g}"
    if gpus is None:
        return
    if gpus < 1:
        raise ConfigError([f"--gpus is {gpus}; a cluster of GPUs has at least one"])
    source = read_source(path, overrides)
    per_node = min(gpus, source.value(("cluster", "gpus_per_node")) or GPUS_PER_NODE)
    if gpus % per_node:
        raise ConfigError(
            [f"--gpus is {gpus}, not a multiple of the {per_node} GPUs of a node (cluster.gpus_per_node)"]
        )
    yield f"cluster.gpus_per_node={per_node}"
    yield f"cluster.num_nodes={gpus // per_node}"
    if gpus > per_node and source.value(("cluster", "address")) is None:
        yield "cluster.address=auto"


def _unknown(config: AnyRunConfig) -> str:
    return (
        f"the shape of model {config.model.path!r} (or of its critic) is not known here; give a folder with its "
        "config.json, weights are not needed"
    )


def _print(console: Console, config: AnyRunConfig, plan: Plan, device: Device) -> None:
    console.print(f"{config.name}: {config.model.path}", style="bold", markup=False)
    critic = f"; a critic of {plan.critic_parameters:,}" if plan.critic_parameters else ""
    console.print(f"{plan.parameters:,} parameters, {plan.trained_parameters:,} trained{critic}")
    if plan.kv_cache_tokens is not None:
        console.print(f"an engine's KV cache holds about {plan.kv_cache_tokens:,} tokens")
    console.print(
        f"at most {tokens_in_pass(config):,} tokens in one pass of a rank, {longest_row(config):,} in a row\n"
    )
    console.print(roles_table(plan.roles))
    for estimate in plan.memory:
        _print_memory(console, estimate)
    console.print("\nFullest place, all its workers at their peaks", style="bold")
    console.print(_fullest(config, plan))
    console.print("\nTime of a step, every response as long as the settings allow", style="bold")
    console.print(_time(config, plan))
    console.print(_assumptions(device), style="dim", markup=False)


def _print_memory(console: Console, estimate: MemoryEstimate) -> None:
    """One table for each place where the worker has memory: phases are columns."""
    for place in ("GPU", "host"):
        columns = [(phase.name, phase.device if place == "GPU" else phase.host) for phase in estimate.phases]
        columns = [(name, items) for name, items in columns if items.keys() - {"runtime"}] or columns[-1:]
        if not columns[0][1]:
            continue
        table = new_table("", "GiB", *(name for name, _ in columns))
        for column in table.columns[1:]:
            column.max_width = 10
        for name in dict.fromkeys(name for _, items in columns for name in items):
            table.add_row(name, *(f"{items[name] / GIB:.2f}" if name in items else "" for _, items in columns))
        table.add_row("all", *(f"{sum(items.values()) / GIB:.2f}" for _, items in columns), style="bold")
        console.print(f"\n{estimate.role}, {place} memory of one worker by phase", style="bold")
        console.print(table)


def _fullest(config: AnyRunConfig, plan: Plan) -> Table:
    cluster = config.cluster
    table = new_table("", "GiB", "needed", "there is", "share")
    rows = [("host memory of a node, object store included", plan.host_peak_bytes, cluster.host_memory_gib)]
    if cluster.gpus_per_node:
        rows.insert(0, ("GPU", plan.gpu_peak_bytes, cluster.gpu_memory_gib))
    for name, needed, available in rows:
        table.add_row(name, f"{needed / GIB:.1f}", f"{available:g}", f"{needed / GIB / available:.0%}")
    return table


def _time(config: AnyRunConfig, plan: Plan) -> Table:
    total = sum(part.seconds for part in plan.parts)
    table = new_table("", "part", "seconds", "share", "limited by")
    for part in plan.parts:
        table.add_row(part.name, _seconds(part.seconds), f"{part.seconds / total:.0%}", part.limit)
    step = step_seconds(config, plan.parts)
    overlaps = isinstance(config, RunConfig) and config.rollout.max_staleness > 0
    table.add_row("step, sampling beside learning" if overlaps else "step", _seconds(step), "", "", style="bold")
    return table


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _assumptions(device: Device) -> str:
    return (
        f"assumed of a {device.name}: {device.flops / 1e12:.3g} TFLOP/s, {device.float32_flops / 1e12:.3g} in "
        f"float32, of which learning reaches {device.learn_share:.0%}, prefill {device.prefill_share:.0%}, decoding "
        f"{device.decode_share:.0%}; memory {device.memory_bytes / 1e9:,.0f} GB/s, of which {device.read_share:.0%}; "
        f"links {device.link_bytes / 1e9:g} GB/s in a node and {device.network_bytes / 1e9:g} between nodes, of which "
        f"{device.send_share:.0%}. {device.source}."
    )
