"""Kills: of workers and of whole Ray nodes while a run goes on, and of the driver at points all over a step.

    python benchmarks/chaos.py workers --output runs/chaos --kills 50
    python benchmarks/chaos.py driver --output runs/chaos

Both train a tiny model for real (vLLM, DeepSpeed, Ray), compare the final weights with those of a run that nobody
disturbed, and have `raylhf audit` replay the ledger: nothing may be lost or doubled. The results go into
chaos_results.json beside this file.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from ray_nodes import RayNodes
from runs import train_once
from safetensors.numpy import load_file

HERE = Path(__file__).parent
RESULTS = HERE / "chaos_results.json"
CONFIGS = HERE.parent / "configs"
POLL_S = 0.01
STALL_S = 600.0
"""Limit of the wait for the next step."""
WORKER_SETTINGS = (
    "rollout.replicas=2",
    "reward.replicas=2",
    "reward.graph={kind: whiten, reward: {kind: characters, characters: aeiou}}",
    "cluster.cpus_per_node=8",
    "learner.num_ranks=2",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=0",
)
NODES = {"learners": (1, 2), "rewards": (2, 1), "rollouts": (2, 1)}
"""Nodes of each kind, and how many workers each of them holds."""
ON_NODES = (
    "cluster.address=auto",
    "cluster.num_nodes=6",
    "cluster.cpus_per_node=2",
    "learner.resources={learners: 1}",
    "reward.resources={rewards: 1}",
    "rollout.resources={rollouts: 1}",
)
VICTIMS = (
    "rollout worker",
    "engine",
    "reward worker",
    "learner",
    "rollout worker during a weight sync",
    *(f"node of {kind}" for kind in NODES),
)
TINY_ONLINE_DPO = (
    "model.path=tiny",
    "data.held_out=4",
    "data.max_prompt_tokens=256",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "rollout.sampling.max_response_tokens=12",
    "rollout.threads=1",
    "learner.micro_batch_tokens=320",
    "learner.lr=1e-3",
    "learner.lora=null",
)
DRIVER_RUNS = {
    f"{method}, ZeRO {stage}": (config, *settings, "learner.num_ranks=2", f"learner.zero_stage={stage}")
    for method, (config, *settings) in {
        "PPO": ("tiny_ppo",),
        "online DPO": ("online_dpo_quickstart", *TINY_ONLINE_DPO),
    }.items()
    for stage in (1, 3)
}
PHASES = {"starting workers": 20.0, "rollout": 0.4, "learn": 0.2, "sync": 0.05, "checkpoint": 0.05}
"""Seconds in a phase, at most, before the driver is killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["workers", "driver"])
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"), help="folder of the runs")
    parser.add_argument("--kills", type=int, default=50, help="kills of workers")
    parser.add_argument("--steps", type=int, help="steps of a run (workers: 8 for each kill; driver: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims and moments")
    arguments = parser.parse_args()
    choice = random.Random(arguments.seed)
    if arguments.what == "workers":
        write(workers=kill_workers(arguments.output, arguments.kills, arguments.steps or 8 * arguments.kills, choice))
        return
    found = []
    for name, (config, *settings) in DRIVER_RUNS.items():
        path = CONFIGS / f"{config}.yaml"
        found.append(kill_driver(arguments.output, name, path, settings, arguments.steps or 8, choice))
        write(driver=found)


def write(**found: Any) -> None:
    """Put the results of one kind of chaos beside those of the other."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | found, indent=1) + "\n")
    print(json.dumps(found, indent=1), flush=True)


class Shaken:
    """A run that is watched from outside: its folder, and its processes by their logs."""

    def __init__(
        self, config: Path, folder: Path, settings: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
        self._command = [sys.executable, "-m", "raylhf.cli", "train", str(config), f"name={folder.name}"]
        self._command += [f"output_dir={folder.resolve().parent}", "tracking.console=plain", *settings]
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.process = self.start()

    def start(self) -> psutil.Popen:
        """Start the command (again)."""
        with (self.folder.parent / f"{self.folder.name}.out").open("a") as out:
            self.process = psutil.Popen(
                self._command, stdout=out, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        return self.process

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def num_rows(self) -> int:
        """Steps that were logged so far, those included that were done again."""
        return sum(event["event"] == "consumed" for event in self.events())

    def events(self) -> list[dict[str, Any]]:
        """The ledger."""
        file = self.folder / "ledger.jsonl"
        if not file.exists():
            return []
        lines = file.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]

    def status(self) -> tuple[str, int]:
        """The phase that the run is in, and the process that says so."""
        file = self.folder / "status.json"
        if not file.exists():
            return "", 0
        status = json.loads(file.read_text())
        return status["phase"], status["pid"]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until `condition` holds; false if the run ended before."""
        deadline = time.monotonic() + STALL_S
        while self.is_running:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happens in {self.folder} any more; see its logs/ and crashes/")
            time.sleep(POLL_S)
        return False

    def worker(self, role: str, choice: random.Random) -> psutil.Process | None:
        """The process of one of the role's workers, or None if the one that was chosen is not there."""
        logs = sorted((self.folder / "logs").glob(f"{role}-*.log"))
        if not logs:
            return None
        starts = re.findall(r"^--- process (\d+) starts", choice.choice(logs).read_text(errors="replace"), re.MULTILINE)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            process = psutil.Process(int(starts[-1]))
            if process.cmdline()[0].startswith("ray::"):
                return process
        return None


class Nodes(RayNodes):
    """A cluster with nodes of each kind, of which one at a time is exchanged for another."""

    def __enter__(self) -> "Nodes":
        super().__enter__()
        self._names: dict[str, list[str]] = {kind: [] for kind in NODES}
        self._numbers = itertools.count()
        for kind, (count, _) in NODES.items():
            for _ in range(count):
                self._grow(kind)
        return self

    def replace(self, kind: str, choice: random.Random) -> None:
        """Kill a node of the kind, with another there to take its work."""
        lost = choice.choice(self._names[kind])
        self._grow(kind)
        self._names[kind].remove(lost)
        self.lose(lost)

    def _grow(self, kind: str) -> None:
        name = f"{kind} {next(self._numbers)}"
        self.add(name, **{kind: NODES[kind][1]})
        self._names[kind].append(name)


def kill_workers(output: Path, kills: int, steps: int, choice: random.Random) -> dict[str, Any]:
    """One long run in which workers of all roles are killed."""
    settings = (*WORKER_SETTINGS, f"num_steps={steps}")
    train_once(CONFIGS / "tiny_ppo.yaml", output / "calm", settings)
    began = time.monotonic()
    with Nodes() as nodes:
        run = Shaken(CONFIGS / "tiny_ppo.yaml", output / "shaken", (*settings, *ON_NODES), nodes.environment)
        counts: Counter[str] = Counter()
        while counts.total() < kills:
            before = run.num_rows()
            if not run.wait_for(lambda before=before: run.num_rows() > before):
                break
            time.sleep(choice.uniform(0, 2))
            kind = choice.choice(VICTIMS)
            if kind.startswith("node of ") and run.is_running:
                nodes.replace(kind.removeprefix("node of "), choice)
                counts[kind] += 1
                print(f"{counts.total()}: {kind} after {before + 1} steps", flush=True)
            elif victim := find(run, kind, choice):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                    counts[kind] += 1
                    print(f"{counts.total()}: {kind} ({victim.pid}) after {before + 1} steps", flush=True)
        code = run.process.wait()
    return {
        "kills": counts.total(),
        "by_victim": dict(counts),
        "steps": steps,
        "exit_code": code,
        "crash_reports": len(list((run.folder / "crashes").glob("*.txt"))),
        "minutes": (time.monotonic() - began) / 60,
        **verdict(output / "calm", run.folder),
    }


def find(run: Shaken, kind: str, choice: random.Random) -> psutil.Process | None:
    """A process of the given kind, if there is one now."""
    if kind == "rollout worker during a weight sync":
        before = run.num_rows()
        run.wait_for(lambda: run.num_rows() > before)  # the learners have just finished a step
        kind = "rollout worker"
    process = run.worker("rollout" if kind == "engine" else kind.split()[0], choice)
    if process is None or kind != "engine":
        return process
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()) or child.name().startswith("VLLM"):
                return child
    return None


def kill_driver(
    output: Path, name: str, config: Path, settings: Sequence[str], steps: int, choice: random.Random
) -> dict[str, Any]:
    """One run whose driver is killed once in every phase, and started again each time."""
    settings = [*settings, f"num_steps={steps}", "checkpoint.every_steps=1"]
    label = re.sub(r"\W+", "_", name).lower()
    train_once(config, output / f"{label}_calm", settings)
    run = Shaken(config, output / f"{label}_killed", settings)
    hit: list[str] = []
    for phase in choice.sample(sorted(PHASES), len(PHASES)):
        if not run.wait_for(lambda phase=phase: run.status() == (phase, run.process.pid)):
            break
        time.sleep(choice.uniform(0, PHASES[phase]))
        hit.append(run.status()[0])
        run.process.kill()
        run.process.wait()
        print(f"{name}: killed in {hit[-1]}", flush=True)
        run.start()
    code = run.process.wait()
    return {"run": name, "killed_in": hit, "exit_code": code, **verdict(output / f"{label}_calm", run.folder)}


def verdict(calm: Path, shaken: Path) -> dict[str, Any]:
    """Whether two runs have the same weights, and what the audit says."""
    files = [folder / "export" / "model.safetensors" for folder in (calm, shaken)]
    equal = all(file.exists() for file in files)
    if equal:
        one, other = map(load_file, files)
        equal = one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    audit = subprocess.run(
        [sys.executable, "-m", "raylhf.cli", "audit", str(shaken)], capture_output=True, text=True, check=False
    )
    return {
        "weights_equal_to_the_bit": bool(equal),
        "audit_exit_code": audit.returncode,
        "audit": [line.strip() for line in audit.stdout.splitlines() if line.strip()],
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
