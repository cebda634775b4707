"""`raylhf launch slurm` on a real Slurm whose nodes are namespaces of this machine."""

import json
import stat
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from launch.slurm_lab import SlurmLab, slurm_lab, why_not

from raylhf.cli.audit import run_audit

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_ppo.yaml"
RAYLHF = str(Path(sys.executable).with_name("raylhf"))
REASON = why_not()
NUM_STEPS = 24

pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    with slurm_lab(tmp_path_factory.mktemp("slurm"), num_nodes=3) as running:
        yield running


def settings(output: Path, name: str, *more: str) -> list[str]:
    return [
        f"name={name}",
        f"output_dir={output}",
        f"num_steps={NUM_STEPS}",
        "checkpoint.every_steps=2",
        "checkpoint.export=false",
        "tracking.wandb=disabled",
        "cluster.num_nodes=2",
        "cluster.host_memory_gib=5",
        *more,
    ]


def launch(lab: SlurmLab, *arguments: str) -> str:
    printed = lab.run([RAYLHF, "launch", "slurm", str(CONFIG), *arguments])
    return printed.split("as job ")[1].split(";")[0]


def rows_of(run: Path) -> list[dict[str, float]]:
    """The run's metrics, but for a row that is being written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def step_of(run: Path) -> int:
    rows = rows_of(run)
    return int(rows[-1]["step"]) if rows else -1


def output_of(run: Path) -> str:
    return "".join(file.read_text(errors="replace")[-3000:] for file in sorted((run / "launch").glob("*.[ol][ou][tg]")))


def until_step(lab: SlurmLab, run: Path, step: int) -> None:
    try:
        lab.until(lambda: step_of(run) >= step, f"step {step}", timeout_s=480)
    except AssertionError:
        print(output_of(run))
        raise


def until_queued_again(lab: SlurmLab, job: str, num_restarts: int) -> None:
    lab.until(
        lambda: lab.job(job)["Restarts"] == str(num_restarts) and lab.job(job)["JobState"] == "PENDING",
        f"restart {num_restarts}",
        timeout_s=240,
    )


def hastened(lab: SlurmLab, job: str) -> dict[str, str]:
    """What Slurm says of a job. One that waits two minutes to be started again is told to wait ten seconds.

    No less, as late words about the former start then end the new one: within the same second its batch script's
    credential counts as revoked, and a node that had been lost is taken away again.
    """
    state = lab.job(job)
    soon = (datetime.now() + timedelta(seconds=15)).isoformat()
    if state["JobState"] == "PENDING" and state["EligibleTime"] > soon:
        lab.run(["scontrol", "update", f"JobId={job}", "StartTime=now+10"])
    return state


def until_started_again(lab: SlurmLab, job: str, which: str) -> None:
    lab.until(lambda: hastened(lab, job)["JobState"] != "PENDING", which, timeout_s=90)


def is_over(state: Mapping[str, str]) -> bool:
    return state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_a_run_on_two_nodes_survives_preemption_and_the_loss_of_a_node(lab: SlurmLab, tmp_path: Path) -> None:
    run = tmp_path / "preempted"
    job = launch(lab, *settings(tmp_path, "preempted", "launch.doctor=false"))
    until_step(lab, run, 2)
    tokens = list((run / "launch").glob("ray-token-*"))
    assert [stat.S_IMODE(token.stat().st_mode) for token in tokens] == [0o600]
    secret = tokens[0].read_text()
    lab.run(["scancel", "--batch", "--signal=USR1", job])
    until_queued_again(lab, job, 1)
    saved = step_of(run)
    assert 2 <= saved < NUM_STEPS
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"

    until_started_again(lab, job, "second start")
    until_step(lab, run, saved + 1)
    node = lab.job(job)["NodeList"].removeprefix("node[").split(",")[-1].split("-")[-1].rstrip("]")
    lab.kill_node(f"node{node}")  # the last of the job's nodes, on which the driver is not
    until_queued_again(lab, job, 2)
    lab.start_node(f"node{node}")
    lab.until(lambda: lab.num_idle() == len(lab.nodes), "idle nodes", timeout_s=60)
    until_started_again(lab, job, "third start")
    # A late word may yet take the node from this start: then there is another.
    lab.until(lambda: is_over(hastened(lab, job)), "end of the job", timeout_s=600)
    print(output_of(run))
    assert lab.job(job)["JobState"] == "COMPLETED"
    assert [row["step"] for row in rows_of(run)] == list(range(NUM_STEPS + 1))
    assert run_audit(str(run)) == 0
    for file in run.rglob("*"):
        if file.is_file() and file.stat().st_size < 1_000_000:
            assert secret not in file.read_text(errors="replace"), file
    assert not list((run / "launch").glob("ray-token-*"))


def workers_of(run: Path) -> list[int]:
    """Rollout workers in each step, as far as there are any steps."""
    return [int(row["rollout/num_workers"]) for row in rows_of(run) if "rollout/num_workers" in row]


def test_rollouts_have_nodes_of_their_own_and_a_second_job_adds_and_takes_away_one(
    lab: SlurmLab, tmp_path: Path
) -> None:
    run = tmp_path / "apart"
    apart = settings(tmp_path, "apart", "launch.slurm.rollout_nodes=1", "num_steps=5000", "learner.lr=1e-5")
    apart += ["checkpoint.every_steps=100", "rollout.num_cpus=1.5"]  # a node has room for one
    job = launch(lab, *apart)
    until_step(lab, run, 2)
    second = launch(lab, "--join", "1", "--rollout", "2", *apart)
    try:
        lab.until(lambda: workers_of(run)[-1:] == [2], "second rollout worker", timeout_s=400)
        lab.run(["scancel", "--batch", "--signal=USR1", second])
        lab.until(lambda: workers_of(run)[-1:] == [1], "single rollout worker", timeout_s=120)
        lab.until(lambda: is_over(lab.job(second)), "end of the second job", timeout_s=120)
        assert lab.job(second)["JobState"] == "COMPLETED"
        step = step_of(run)
        until_step(lab, run, step + 3)
        lab.run(["scancel", job])
        lab.until(lambda: is_over(lab.job(job)), "end of the first job", timeout_s=120)
    except AssertionError:
        print(output_of(run))
        raise
    assert "Traceback" not in output_of(run)
    driver = (run / "launch" / f"slurm-{job}.out").read_text()
    assert driver.count("one process a node (2) summed") == 1, driver  # raylhf doctor, before it trains
    assert run_audit(str(run)) == 0
