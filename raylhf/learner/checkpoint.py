"""The learner's part of a checkpoint: DeepSpeed's engines, what the worker counts, and random states."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylhf.learner.changed_shape import load_converted, must_convert, read_shape, write_shape
from raylhf.learner.models import LearnerModels

_TAG = "state"


def save_engine(folder: Path, engine: Any, state: dict[str, Any]) -> None:
    """Write an engine (collective) with `state` and torch's random state. Frozen weights are left out."""
    engine.save_checkpoint(
        str(folder),
        tag=_TAG,
        client_state={"raylhf": state, "torch_rng": torch.get_rng_state()},
        exclude_frozen_parameters=_has_frozen(engine),
    )
    write_shape(folder, engine)


def load_engine(folder: Path, engine: Any) -> dict[str, Any]:
    """Restore an engine and torch's random state (collective), and return the saved state.

    What as many ranks saved with the same ZeRO stage is loaded as it is; anything else is converted first.

    Raises:
        ValueError: the folder holds no checkpoint that fits, or it cannot be converted.
    """
    saved = read_shape(folder)
    if saved is not None and must_convert(
        saved, num_ranks=dist.get_world_size(), zero_stage=engine.zero_optimization_stage()
    ):
        client_state = load_converted(folder, engine, saved, tag=_TAG)
    else:
        client_state = _load_as_saved(folder, engine)
    if engine.zero_optimization_stage() == 3:
        # Partitioned again, as before a first forward pass: DeepSpeed leaves small weights gathered, and with adapters
        # an engine that has not run yet then loses count of its modules ("tracing error").
        engine.optimizer.checkpoint_event_prologue()
    torch.set_rng_state(client_state["torch_rng"])
    return client_state["raylhf"]


def _load_as_saved(folder: Path, engine: Any) -> dict[str, Any]:
    loaded, client_state = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not _has_frozen(engine))
    if loaded is None:
        raise ValueError(f"{folder} holds no learner checkpoint; remove the folder, or set checkpoint.resume=false")
    return client_state


def save_learner(folder: Path, models: LearnerModels, state: dict[str, Any]) -> None:
    """Write both engines (collective) with `state` beside the policy's."""
    save_engine(folder / "policy", models.policy, state)
    if models.critic is not None:
        save_engine(folder / "critic", models.critic, {})
    if models.reference_moves and models.reference is not None and dist.get_rank() == 0:
        torch.save(models.reference.state_dict(), folder / "reference.pt")


def files_seen(folder: Path) -> list[str]:
    """Names of a checkpoint's files that this node sees: its own and those of other ranks, as far as written."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def load_learner(folder: Path, models: LearnerModels) -> dict[str, Any]:
    """Restore both engines (collective) and return the saved state.

    Raises:
        ValueError: the folder holds no learner checkpoint that fits.
    """
    if models.critic is not None:
        load_engine(folder / "critic", models.critic)
    if models.reference_moves and models.reference is not None:
        models.reference.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))
    return load_engine(folder / "policy", models.policy)


def _has_frozen(engine: Any) -> bool:
    return any(not p.requires_grad for p in engine.module.parameters())
