"""Runs of `raylhf train` that benchmarks are made of: each is done once, and read from its folder."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def train_once(config: Path, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Train into `folder` unless the run is there and complete."""
    summary = folder / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["status"] == "complete":
        return
    command = [sys.executable, "-m", "raylhf.cli", "train", str(config), f"name={folder.name}"]
    command += [f"output_dir={folder.resolve().parent}", *overrides]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def rows_with(folder: Path, key: str) -> list[dict[str, Any]]:
    """The steps of a run that have the metric `key`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get(key) is not None]
