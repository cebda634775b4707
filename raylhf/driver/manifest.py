"""The manifest of a checkpoint: every file with its size and hash, written last, checked before anything is loaded."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_NUM_THREADS = 4
"""A few keep a disk busy; hashing lets other threads run."""


def write_manifest(folder: Path, *, step: int) -> None:
    """Write size and SHA-256 of every file of `folder` to its manifest. Files, manifest and folders are then on disk.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        entries = pool.map(_synced_entry, files)
        listed = {str(file.relative_to(folder)): entry for file, entry in zip(files, entries, strict=True)}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({"step": step, "files": listed}, indent=1))
    for path in [manifest, *(path for path in paths if path.is_dir()), folder]:
        sync(path)


def find_damage(folder: Path, *, step: int, required: str) -> str | None:
    """What differs between a checkpoint's files and its manifest, as a clause; None for a whole checkpoint.

    Every file is read. `required` is a file that the manifest must list.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        found_step = manifest["step"]
    except FileNotFoundError:
        return f"{MANIFEST_FILE}, which is written last, is missing"
    except OSError as error:
        return f"{MANIFEST_FILE} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is cut short or is no manifest"
    if found_step != step:
        return f"{MANIFEST_FILE} is that of step {found_step}"
    if required not in expected:
        return f"{MANIFEST_FILE} does not list {required}"
    return _find_damaged_file(folder, expected)


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_damaged_file(folder: Path, expected: Mapping[str, tuple[int, str]]) -> str | None:
    for name, (num_bytes, _) in expected.items():  # before the hashes, which take long
        try:
            found_bytes = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found_bytes != num_bytes:
            return f"{name} has {found_bytes} bytes instead of {num_bytes}"

    def check(name: str) -> str | None:
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if digest == expected[name][1] else f"{name} has another SHA-256 than when it was written"

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return next((finding for finding in pool.map(check, expected) if finding is not None), None)


def _synced_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
