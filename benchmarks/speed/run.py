"""How fast raylhf is: against TRL, and against its own engines.

    python benchmarks/speed/run.py [--only NAME ...]

Writes results.json, results.md and plots beside this file; parts that are not run keep their last results. Which parts
there are: README.md.
"""

import argparse
import fcntl
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import plots
import report
import workload as work

from raylhf.config.devices import cpu_has_bfloat16

RESULTS = HERE / "results.json"
PARTS = [*work.WORKLOADS, "efficiency", "overlap", "padding", "growth", "sync", "startup", "gpu"]
Turn = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="folder of runs and environments")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a run")
    parser.add_argument("--lock", type=Path, help="a file that is locked while something is measured")
    arguments = parser.parse_args()
    turn: Turn = partial(locked, arguments.lock) if arguments.lock else nullcontext
    for name in arguments.only:
        if name.endswith("_bf16") and not cpu_has_bfloat16():
            print(f"{name}: this CPU has no instructions for bfloat16")
        elif name in work.WORKLOADS:
            against_trl(name, arguments, turn)
        elif (found := measured(name, arguments, turn)) is not None:
            keep(found, name)
    write()


def against_trl(name: str, arguments: argparse.Namespace, turn: Turn) -> None:
    import end_to_end

    folder, note = arguments.output / name, partial(keep, part="end_to_end", name=name)
    end_to_end.measure(name, folder, runs=arguments.runs, steps=arguments.steps, turn=turn, note=note)


def measured(name: str, arguments: argparse.Namespace, turn: Turn) -> Any:
    """What the part finds; None where it cannot run here. Imported when asked for: some import torch, others Ray."""
    folder = arguments.output / name
    match name:
        case "efficiency":
            module = importlib.import_module("efficiency")
            return module.measure(folder, runs=arguments.runs, steps=arguments.steps, turn=turn)
        case "growth":
            return importlib.import_module("growth").measure(folder, turn=turn)
        case "padding":
            return importlib.import_module("padding").measure()
        case "overlap":
            with turn():
                return importlib.import_module("overlap.run").measure(folder)
        case "gpu":
            return on_a_gpu()
        case _:
            return in_a_script(name, folder, turn)


def in_a_script(name: str, folder: Path, turn: Turn) -> Any:
    """What a script beside this one writes to its --output; None where there is none."""
    if not (HERE / f"{name}.py").exists():
        print(f"{name}: {name}.py is not here")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with turn():
        command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(folder / "found.json")]
        subprocess.run(command, check=True)
    return json.loads((folder / "found.json").read_text())


def on_a_gpu() -> Any:
    import torch

    if not torch.cuda.is_available():
        print("gpu: there is none here")
        return None
    done = subprocess.run([sys.executable, str(HERE / "gpu.py")], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def keep(found: Any, part: str, name: str | None = None) -> None:
    """Put what was found in the place of what was there."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if name is None:
        results[part] = found
    else:
        results.setdefault(part, {})[name] = found
    RESULTS.write_text(json.dumps(report.rounded(results), indent=1) + "\n")
    print(f"{part} {name or ''}: {json.dumps(report.rounded(found))}", flush=True)
    write()


def write() -> None:
    """The table and the plots, from all results."""
    results = json.loads(RESULTS.read_text())
    report.write(results, HERE)
    plots.draw(results, HERE)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among those who lock the file."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends too
    main()
