"""The learner's part of a checkpoint: DeepSpeed's engines, the KL coefficient, counters and random states."""

from pathlib import Path
from typing import Any

import torch

from raylhf.learner.models import LearnerModels

_TAG = "state"


def save_learner(folder: Path, models: LearnerModels, state: dict[str, Any]) -> None:
    """Write both engines (collective) with `state` beside the policy's. Frozen weights are left out with LoRA."""
    has_frozen = any(not p.requires_grad for p in models.policy.module.parameters())
    client_state = {"raylhf": state, "torch_rng": torch.get_rng_state()}
    models.policy.save_checkpoint(
        str(folder / "policy"), tag=_TAG, client_state=client_state, exclude_frozen_parameters=has_frozen
    )
    if models.critic is not None:
        models.critic.save_checkpoint(str(folder / "critic"), tag=_TAG, exclude_frozen_parameters=has_frozen)


def load_learner(folder: Path, models: LearnerModels) -> dict[str, Any]:
    """Restore both engines (collective) and return the saved state.

    Raises:
        ValueError: the folder holds no learner checkpoint that fits.
    """
    has_frozen = any(not p.requires_grad for p in models.policy.module.parameters())
    loaded, client_state = models.policy.load_checkpoint(
        str(folder / "policy"), tag=_TAG, load_module_strict=not has_frozen
    )
    if loaded is None:
        raise ValueError(f"{folder} holds no learner checkpoint; remove the folder, or set checkpoint.resume=false")
    if models.critic is not None:
        models.critic.load_checkpoint(str(folder / "critic"), tag=_TAG, load_module_strict=not has_frozen)
    torch.set_rng_state(client_state["torch_rng"])
    return client_state["raylhf"]
