"""Checkpoint folders: written under a temporary name, synced, renamed; older ones removed only afterwards."""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raylhf.driver.manifest import find_damage, sync, write_manifest
from raylhf.driver.ownership import require_own_files
from raylhf.tracking.jsonl import unused_name

_PREFIX, _DAMAGED_PREFIX = "step_", "damaged_"
_WRITING, _REPLACED, _REMOVING = ".writing_", ".replaced_", ".removing_"
_CONVERTED = ".universal_"
"""What learners make for themselves of a checkpoint of another shape, and remove when they have loaded it."""
_STATE_FILE = "driver.json"
APPEAR_TIMEOUT_S = 30.0
"""Within which a network file system shows one node what another one wrote."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. The sentence says which is the newest one that is there."""


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run and the driver's state in it; None where there was never one.

    Every file is read and compared with the manifest. Damaged checkpoints that are newer than the one found are told
    of on standard error and renamed (`damaged_step_N`), so that they are neither counted nor taken again.

    Raises:
        ValueError: there are checkpoints, and none is whole (they keep their names); or others may have written it.
    """
    _finish_replacement(run_dir)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(_checkpoints(run_dir)):
        finding = find_damage(folder, step=_step(folder), required=_STATE_FILE)
        if finding is None:
            for bad, why in damaged:
                _set_aside(bad, why, instead=folder)
            require_own_files(run_dir, folder)
            return folder, json.loads((folder / _STATE_FILE).read_bytes())
        damaged.append((folder, finding))
    if damaged:
        findings = "; ".join(f"{folder.name}: {finding}" for folder, finding in damaged)
        raise ValueError(
            f"no checkpoint in {run_dir / 'checkpoints'} is whole ({findings}); put one of them back from a copy, or "
            "set checkpoint.resume=false to start anew (these are then moved aside)"
        )
    return None


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """The driver's state in the newest checkpoint, which is not verified; None where there is no checkpoint.

    Raises:
        ValueError: the state cannot be read.
    """
    folders = _checkpoints(run_dir)
    if not folders:
        return None
    file = folders[-1] / _STATE_FILE
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); `raylhf train` goes back to an older checkpoint") from error


def set_checkpoints_aside(run_dir: Path) -> None:
    """Move the checkpoints of an earlier run out of the way of one that starts anew (`checkpoints.1`)."""
    folder = run_dir / "checkpoints"
    if folder.exists():
        folder.rename(unused_name(folder))


@contextmanager
def writing_checkpoint(run_dir: Path, step: int, *, let_through: tuple[type[RuntimeError], ...] = ()) -> Iterator[Path]:
    """A folder to write step `step` into, which `commit_checkpoint` inside the block makes a checkpoint.

    Whatever fails inside, the half-written folder is removed, which frees the disk, and older checkpoints stay.
    `let_through` are failures that the caller handles: they go on as they are.

    Raises:
        CheckpointError: in the place of an OSError, or of another RuntimeError (a worker that failed), its cause.
    """
    try:
        yield begin_checkpoint(run_dir, step)
    except BaseException as error:
        free_gib = shutil.disk_usage(run_dir).free / 2**30
        with suppress(OSError):  # the failure that led here is the one to report
            _remove_unfinished(run_dir)
        if isinstance(error, (OSError, RuntimeError)) and not isinstance(error, let_through):
            raise CheckpointError(_failure(run_dir, step, str(error), free_gib)) from error
        raise


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """An empty folder to write step `step` into. It becomes a checkpoint with `commit_checkpoint`."""
    _remove_unfinished(run_dir)  # of a run that died while it saved
    folder = run_dir / "checkpoints" / f"{_WRITING}{step}"
    folder.mkdir(parents=True)
    return folder


def require_files(folder: Path, seen_by_ranks: Sequence[Sequence[str]], *, timeout_s: float = APPEAR_TIMEOUT_S) -> None:
    """Wait until the driver sees every file that a learner sees in a folder that is not committed yet.

    Raises:
        OSError: it does not: the learners write to another disk.
    """
    names = sorted({name for names in seen_by_ranks for name in names})
    deadline = time.monotonic() + timeout_s
    while missing := [name for name in names if not (folder / name).is_file()]:
        if time.monotonic() > deadline:
            raise OSError(
                f"the driver does not see {len(missing)} of {len(names)} files that learners wrote, as {missing[0]}; "
                "output_dir must be on storage that every node sees"
            )
        time.sleep(0.5)


def commit_checkpoint(folder: Path, *, step: int, state: dict[str, Any], keep: int) -> Path:
    """Add the driver's state and the manifest, sync all to disk, rename, then remove all but the newest `keep`.

    Raises:
        OSError: something cannot be written. What was a checkpoint before still is one.
    """
    (folder / _STATE_FILE).write_text(json.dumps(state, indent=1))
    write_manifest(folder, step=step)
    checkpoints = folder.parent
    final = checkpoints / f"{_PREFIX}{step}"
    if final.exists():
        final.rename(checkpoints / f"{_REPLACED}{step}")
    folder.rename(final)
    sync(checkpoints)
    sync(checkpoints.parent)
    _finish_replacement(checkpoints.parent)
    for old in _checkpoints(checkpoints.parent)[:-keep]:
        doomed = old.rename(checkpoints / f"{_REMOVING}{_step(old)}")  # half removed, it is no damaged checkpoint
        shutil.rmtree(doomed, ignore_errors=True)  # what is left is removed the next time
    return final


def _failure(run_dir: Path, step: int, error: str, free_gib: float) -> str:
    reason, _, rest = error.partition("\n")  # of a worker's failure, its traceback
    found = _checkpoints(run_dir)
    newest = f"the newest checkpoint is {found[-1].name}" if found else "there is no checkpoint"
    return (
        f"step {step} could not be saved in {run_dir / 'checkpoints'} ({reason}; {free_gib:.3g} GiB of the disk were "
        f"free); {newest}. Free space, or mend what failed, and give the same command again: it goes on from "
        f"{'there' if found else 'the beginning'}." + (f"\n{rest}" if rest else "")
    )


def _checkpoints(run_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first."""
    folders = [
        folder
        for folder in run_dir.glob(f"checkpoints/{_PREFIX}*")
        if folder.is_dir() and folder.name.removeprefix(_PREFIX).isdecimal()
    ]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _set_aside(folder: Path, finding: str, *, instead: Path) -> None:
    aside = folder.with_name(f"{_DAMAGED_PREFIX}{folder.name}")
    if aside.exists():
        aside = unused_name(aside)
    folder.rename(aside)
    print(
        f"raylhf: checkpoint {folder.name} is damaged ({finding}); going back to {instead.name}. The damaged one is "
        f"now {aside}; remove it when you need it no more",
        file=sys.stderr,
    )


def _finish_replacement(run_dir: Path) -> None:
    """Where a step was being saved again: put the old folder back if the new one is not there, else remove it."""
    for replaced in run_dir.glob(f"checkpoints/{_REPLACED}*"):
        final = replaced.with_name(_PREFIX + replaced.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)


def _remove_unfinished(run_dir: Path) -> None:
    """Remove what is half written, half removed or left over."""
    _finish_replacement(run_dir)
    for prefix in (_WRITING, _REMOVING, _CONVERTED):
        for folder in run_dir.glob(f"checkpoints/{prefix}*"):
            # A worker may be writing into it still; what is left is removed the next time.
            shutil.rmtree(folder, ignore_errors=True)
