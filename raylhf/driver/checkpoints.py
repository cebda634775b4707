"""Checkpoint folders: written under a temporary name, synced, renamed; older ones removed only afterwards."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from raylhf.tracking.jsonl import unused_name

_PREFIX = "step_"
_STATE_FILE = "driver.json"


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint of a run and the driver's state in it."""
    for folder in reversed(_checkpoints(run_dir)):
        return folder, json.loads((folder / _STATE_FILE).read_text())
    return None


def set_checkpoints_aside(run_dir: Path) -> None:
    """Move the checkpoints of an earlier run out of the way of one that starts anew (`checkpoints.1`)."""
    folder = run_dir / "checkpoints"
    if folder.exists():
        folder.rename(unused_name(folder))


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """An empty folder to write step `step` into. It becomes a checkpoint with `commit_checkpoint`."""
    for unfinished in run_dir.glob("checkpoints/.writing_*"):  # of a run that died while it saved
        shutil.rmtree(unfinished)
    folder = run_dir / "checkpoints" / f".writing_{step}"
    folder.mkdir(parents=True)
    return folder


def commit_checkpoint(folder: Path, *, step: int, state: dict[str, Any], keep: int) -> Path:
    """Add the driver's state, sync everything to disk, rename, then remove all but the newest `keep`."""
    (folder / _STATE_FILE).write_text(json.dumps(state, indent=1))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    final = folder.parent / f"{_PREFIX}{step}"
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    _sync(final.parent)
    for old in _checkpoints(final.parent.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def _checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [
        folder
        for folder in run_dir.glob(f"checkpoints/{_PREFIX}*")
        if folder.name.removeprefix(_PREFIX).isdecimal() and (folder / _STATE_FILE).is_file()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix(_PREFIX)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
