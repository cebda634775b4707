"""TRL's side: an environment of its own with pinned versions, and runs of trl_peer.py in it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import workload as work
from machine import Neighbours

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "trl-requirements.txt"
MICRO = {"online_dpo": 16, "grpo": 16, "rloo": 16, "dpo": 2, "reward_model": 2}
"""Rows of one forward and backward pass: what was fastest for TRL here, see README.md."""


def environment(folder: Path) -> Path:
    """The Python of TRL's environment, which is made the first time and when the pinned versions change."""
    python, marker = folder / "bin" / "python", folder / "requirements.txt"
    if marker.exists() and marker.read_text() == REQUIREMENTS.read_text():
        return python
    links = [part for place in os.environ.get("PIP_FIND_LINKS", "").split() for part in ("--find-links", place)]
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
    backend = [] if links else ["--torch-backend", "cpu"]
    install = [*uv, "pip", "install", "--quiet", "--python", str(python), "--compile-bytecode", *links, *backend]
    subprocess.run([*install, "--requirement", str(REQUIREMENTS)], check=True)
    marker.write_text(REQUIREMENTS.read_text())
    return python


def run(
    python: Path, workload: work.Workload, data: Path, folder: Path, *, model: str, steps: int, **changes: Any
) -> dict[str, Any]:
    """Train; the steps as rows with seconds, tokens and parts, the first left out as on raylhf's side."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = workload.as_json() | {"model": model, "data": str(data), "steps": steps, "folder": str(folder)}
    spec |= {"output": str(folder / "steps.json"), "micro": MICRO[workload.method]}
    spec |= {"bf16": workload.dtype == "bfloat16", **changes}
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "steps.json").unlink(missing_ok=True)
    neighbours = Neighbours()
    variables = {
        **neighbours.mark,
        "OMP_NUM_THREADS": str(workload.threads),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    began = time.time()
    with (folder / "output.txt").open("w") as output:
        command = [str(python), str(HERE / "trl_peer.py"), str(folder / "spec.json")]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **variables})
        try:
            with neighbours:
                code = process.wait()
        finally:
            process.kill()
    if code:
        raise SystemExit(f"TRL's run in {folder} failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    rows = json.loads((folder / "steps.json").read_text())
    startup_s = rows[0]["end"] - rows[0]["seconds"] - began
    for row in rows:
        ended = row.pop("end")
        row["others"] = neighbours.share(ended - row["seconds"], ended)
    return {"startup_s": startup_s, "steps": rows[1:]}
