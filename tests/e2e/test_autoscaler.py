"""A run on a Ray with an autoscaler, which brings nodes for rollout workers that join or are lost, and lets them go."""

import re
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from autoscaled_ray import AutoscaledRay
from command_line import END_S, TEST_S

pytestmark = pytest.mark.timeout(TEST_S)
NODES = {
    "learning": ({"CPU": 2, "learners": 1, "rewards": 1}, 1, 1),
    "sampling": ({"CPU": 2, "rollouts": 1}, 1, 3),
}
SETTINGS = (
    "num_steps=5000",
    "checkpoint.every_steps=0",
    "evaluation.every_steps=0",
    "rollout.prompts_per_step=4",
    "rollout.resources={rollouts: 1}",
    "reward.resources={rewards: 1}",
    "learner.resources={learners: 1}",
    "learner.num_ranks=1",
    "learner.micro_batch_tokens=640",
    "cluster.address=auto",
    "cluster.num_nodes=3",
)


@pytest.fixture
def autoscaled():
    folder = Path(tempfile.mkdtemp(prefix="a", dir="/tmp"))  # Ray keeps sockets below it, whose paths may not be long
    try:
        with AutoscaledRay(folder, NODES) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_rollout_nodes_come_and_go_with_the_workers_while_the_learner_stays(raylhf, autoscaled):
    command = raylhf.start("grown", *SETTINGS, environment=autoscaled.environment)

    def wait_for(condition, what):
        print(f"{time.monotonic():.0f} s: waiting for {what}")
        try:
            command.wait_for(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{autoscaled.story()}") from None

    def scale(size):
        asked = raylhf.call(f"to_{size}", "scale", str(command.folder), "--rollout", str(size))
        assert asked.process.returncode == 0, asked.story()

    def serve(size):
        return lambda: num_workers(command)[-1:] == [size]

    wait_for(serve(1), "first step")
    (first_node,), learner = autoscaled.nodes("rollouts"), whereabouts(command, "learner-0")
    scale(2)
    wait_for(serve(2), "second rollout worker")
    assert len(autoscaled.nodes("rollouts")) == 2

    psutil.Process(first_node).kill()
    wait_for(serve(1), "loss of the first rollout worker")
    wait_for(serve(2), "another in its place")
    node = whereabouts(command, "rollout-0")[1]
    assert len(autoscaled.nodes("rollouts")) == 2 and node != first_node

    scale(1)
    wait_for(lambda: autoscaled.nodes("rollouts") == [node], "end of the second worker's node")
    steps = len(command.rows())
    wait_for(lambda: len(command.rows()) > steps and serve(1)(), "step with one worker")
    assert whereabouts(command, "learner-0") == learner and autoscaled.nodes("learners") == [learner[1]]
    assert processes(command, "learner-0") == [str(learner[0])]
    command.interrupt()
    assert command.wait(END_S) == 130, command.story()
    audit = raylhf.call("audit_of_grown", "audit", str(command.folder))
    assert audit.process.returncode == 0 and "nothing lost, nothing doubled" in audit.output, audit.story()
    assert {report.name[4:] for report in (command.folder / "crashes").glob("*")} == {"rollout-0.txt"}


def num_workers(command):
    return [int(row["rollout/num_workers"]) for row in command.rows() if "rollout/num_workers" in row]


def processes(command, worker):
    """Numbers of all processes that the worker has been."""
    log = (command.folder / "logs" / f"{worker}.log").read_text(errors="replace")
    return re.findall(r"^--- process (\d+) starts", log, re.MULTILINE)


def whereabouts(command, worker):
    """The worker's process, the node that it is on, and when it started."""
    process = psutil.Process(int(processes(command, worker)[-1]))
    return process.pid, process.ppid(), process.create_time()
