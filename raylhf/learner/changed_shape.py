"""A checkpoint that another number of ranks, or another ZeRO stage, wrote: made universal, then loaded.

DeepSpeed's universal checkpoints hold every parameter with its Adam moments by name, whole. DeepSpeed 0.19 makes them
of ZeRO 1 to 3, but each stage's loader reads only what the same stage wrote: the other stages' files have other names
and contents, stage 3 keeps no step counts and gives all parameter groups those of the first. So what is converted is
rewritten for all of them (`_complete`), ZeRO 0 is written and read here, and step counts come from `shape.json`.
"""

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from raylhf.learner.engine import adam_states, inner_optimizer

_SHAPE_FILE = "shape.json"
_STAGE_0_STATES = "mp_rank_00_model_states.pt"
_STAGE_3_STATES = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How an engine's checkpoint is cut, and what the cutting loses."""

    num_ranks: int
    zero_stage: int
    adam_steps: tuple[float, ...]
    """Of each parameter group; 0 before its first."""
    names: tuple[tuple[str, ...], ...] = ()
    """Of the parameters in each group, with ZeRO 0, whose checkpoint numbers them."""


def shape_of(engine: Any) -> Shape:
    """The engine's shape and step counts now."""
    stage, groups = engine.zero_optimization_stage(), inner_optimizer(engine).param_groups
    steps = [max((float(s["step"]) for s in adam_states(engine, i)), default=0.0) for i in range(len(groups))]
    names = _names(engine) if stage == 0 else ()
    return Shape(num_ranks=dist.get_world_size(), zero_stage=stage, adam_steps=tuple(steps), names=names)


def write_shape(folder: Path, engine: Any) -> None:
    """Note the engine's shape beside its checkpoint (rank 0 writes)."""
    shape = shape_of(engine)
    if dist.get_rank() == 0:
        (folder / _SHAPE_FILE).write_text(json.dumps(asdict(shape)))


def read_shape(folder: Path) -> Shape | None:
    """The shape of an engine's checkpoint; None where none was noted, by an older raylhf."""
    file = folder / _SHAPE_FILE
    if not file.is_file():
        return None
    raw = json.loads(file.read_bytes())
    raw |= {"adam_steps": tuple(raw["adam_steps"]), "names": tuple(map(tuple, raw["names"]))}
    return Shape(**raw)


def must_convert(saved: Shape, *, num_ranks: int, zero_stage: int) -> bool:
    """Whether a checkpoint must be converted for these ranks. Without ZeRO, every rank reads the same one file."""
    if saved.zero_stage == zero_stage == 0:
        return False
    return (saved.num_ranks, saved.zero_stage) != (num_ranks, zero_stage)


def load_converted(folder: Path, engine: Any, saved: Shape, *, tag: str) -> dict[str, Any]:
    """Restore weights, moments and step counts (collective), and return the client's state.

    Raises:
        ValueError: this change of shape is not possible, or the disk is full.
    """
    stage = engine.zero_optimization_stage()
    if engine.bfloat16_enabled() and 0 in (stage, saved.zero_stage):
        remedy = "0 (any number of ranks)" if saved.zero_stage == 0 else "1, 2 or 3"
        raise ValueError(
            f"{folder} was saved with learner.zero_stage={saved.zero_stage}, and bfloat16 weights cannot go from or to "
            f"stage 0, where DeepSpeed keeps their float32 copies in another way; set learner.zero_stage to {remedy}"
        )
    if not any(saved.adam_steps):  # as the policy's is while its critic warms up: the weights are those it starts from
        return _load_states(next((folder / tag).glob("*_model_states.pt")))
    with _converted(folder, saved, tag) as universal:
        load = _load_stage_0 if stage == 0 else _load_universal
        state = load(universal, engine, tag)
        _set_steps(engine, saved.adam_steps)
    return state


@contextmanager
def _converted(folder: Path, saved: Shape, tag: str) -> Iterator[Path]:
    """A universal checkpoint of the one in `folder`, for as long as the block lasts; rank 0 makes and removes it."""
    told: list[Any] = [None, None]  # its path, and what went wrong
    try:
        if dist.get_rank() == 0:
            try:
                # Beside the checkpoint, where all ranks read, and not in it: the manifest lists every file there. What
                # a killed run leaves, the driver removes with other unfinished folders.
                told[0] = tempfile.mkdtemp(prefix=".universal_", dir=folder.parent.parent)
                _convert(folder / tag, Path(told[0]) / tag, saved)
            except Exception as error:  # whatever it was, the other ranks wait to be told
                free_gib = shutil.disk_usage(folder).free / 2**30
                told[1] = f"{type(error).__name__}: {error}; {free_gib:.3g} GiB of the disk were free"
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if told[1] is not None:
            raise ValueError(
                f"{folder} could not be converted for another number of ranks or ZeRO stage ({told[1]}); see that "
                "three times its size are free, or go on with the shape that wrote it: "
                f"learner.num_ranks={saved.num_ranks} learner.zero_stage={saved.zero_stage}"
            )
        yield Path(told[0])
        dist.barrier()  # all have read
    finally:
        if dist.get_rank() == 0 and told[0] is not None:
            shutil.rmtree(told[0], ignore_errors=True)


def _convert(source: Path, target: Path, saved: Shape) -> None:
    if saved.zero_stage == 0:
        _write_stage_0(source, target, saved.names)
    else:
        # One worker works in this process: others would be forked from one with a process group and threads.
        settings = Namespace(input_folder=str(source), output_folder=str(target), keep_temp_folder=False, strict=True)
        settings.num_extract_workers = settings.num_merge_workers = 1
        settings.inject_missing_state = True  # the version of the format, which DeepSpeed itself leaves out
        ds_to_universal.main(settings)
    _complete(target, saved)


def _complete(target: Path, saved: Shape) -> None:
    """Make every stage's loader find what it needs, and nothing that is not so for the present engine."""
    for file in target.glob("zero/*/*.pt"):
        if file.stem == "step":
            file.unlink()
        elif isinstance(tensor := torch.load(file, weights_only=True), Tensor):
            torch.save({"param": tensor}, file)
    groups = [{"params": []} for _ in saved.adam_steps]  # learning rates and the like: those of the settings
    state = {"state": {0: {"step": torch.tensor(saved.adam_steps[0])}}, "param_groups": groups}
    versioned = {"ds_version": deepspeed.__version__, "param_groups": groups, "optimizer_state_dict": state}
    torch.save(versioned, target / "zero" / "optimizer_state.pt")
    found = target / (_STAGE_3_STATES if saved.zero_stage == 3 else _STAGE_0_STATES)
    for name in {_STAGE_0_STATES, _STAGE_3_STATES} - {found.name}:
        shutil.copy(found, target / name)


def _write_stage_0(source: Path, target: Path, names: Sequence[Sequence[str]]) -> None:
    """A universal checkpoint of one without ZeRO, which numbers the parameters through the groups."""
    saved = _load_states(source / _STAGE_0_STATES)
    flat = [name for group in names for name in group]
    for number, name in enumerate(flat):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        weight = saved["module"][name]
        state = saved["optimizer"]["state"].get(number, {})  # none where there was never a gradient
        torch.save({"param": weight}, folder / "fp32.pt")
        for key in _MOMENTS:
            torch.save({"param": state.get(key, torch.zeros_like(weight))}, folder / f"{key}.pt")
    del saved["module"], saved["optimizer"]
    torch.save(saved, target / _STAGE_0_STATES)


def _load_universal(universal: Path, engine: Any, tag: str) -> dict[str, Any]:
    engine._config.load_universal_checkpoint = True  # as `checkpoint.load_universal` in DeepSpeed's settings would
    try:
        _, client_state = engine.load_checkpoint(str(universal), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    return client_state


def _load_stage_0(universal: Path, engine: Any, tag: str) -> dict[str, Any]:
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = inner_optimizer(engine)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            folder = universal / tag / "zero" / names[id(parameter)]
            whole = {key: torch.load(folder / f"{key}.pt")["param"] for key in ("fp32", *_MOMENTS)}
            whole = {key: value.view_as(parameter).to(parameter) for key, value in whole.items()}
            parameter.data.copy_(whole.pop("fp32"))
            optimizer.state[parameter] = whole
    states = _load_states(universal / tag / _STAGE_0_STATES)
    engine.global_steps, engine.global_samples = states["global_steps"], states["global_samples"]
    return states


def _load_states(file: Path) -> dict[str, Any]:
    """What DeepSpeed writes beside the optimizer's parts, with the client's state in it."""
    return torch.load(file, map_location="cpu", weights_only=True)


def _set_steps(engine: Any, steps: Sequence[float]) -> None:
    is_tensor = isinstance(inner_optimizer(engine), torch.optim.AdamW)  # DeepSpeed's Adam on the CPU counts in ints
    for group, step in enumerate(steps):
        for state in adam_states(engine, group):
            state["step"] = torch.tensor(step, dtype=torch.float32) if is_tensor else int(step)


def _names(engine: Any) -> tuple[tuple[str, ...], ...]:
    names = {id(p): name for name, p in engine.module.named_parameters()}
    groups = inner_optimizer(engine).param_groups
    return tuple(tuple(names.get(id(p), "") for p in group["params"]) for group in groups)
