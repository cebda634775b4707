"""`raylhf doctor` on a real Ray of two nodes, and what it asks them with."""

import json
import time

import pytest
import ray
from command_line import TINY
from ray_nodes import RayNodes

from raylhf.cluster.probe import RayNode, ask_nodes, joined_nodes

JOIN = ("cluster.address=auto", "cluster.num_nodes=2", "cluster.host_memory_gib=1", "tracking.wandb=disabled")

STATUSES = ("ok  ", "warn", "FAIL", "skip")
CHECKS = (
    *("nodes", "placement", "versions", "host memory", "/dev/shm", "/tmp", "open files", "clock"),
    *("shared storage", "disk", "bandwidth", "gloo", "W&B"),
)


@pytest.fixture(scope="module")
def two_nodes():
    with RayNodes() as nodes:
        nodes.add("second")
        yield nodes


def test_two_nodes_that_are_well_are_found_so(raylhf, two_nodes):
    output = raylhf.place / "doctored"
    command = raylhf.call("well", "doctor", str(TINY), *JOIN, f"output_dir={output}", environment=two_nodes.environment)
    assert command.process.returncode == 0, command.story()
    checks = {line[5:20].strip(): line[:4].strip() for line in command.output.splitlines() if line[:4] in STATUSES}
    assert checks.keys() == {*CHECKS}, command.story()
    assert {check for check, status in checks.items() if status not in ("ok", "warn")} == {"W&B"}
    assert command.seconds < 120  # 19 on two cores that nobody else uses
    assert list(output.iterdir()) == []  # the canaries are gone


def test_missing_nodes_and_memory_are_named_and_the_command_fails(raylhf, two_nodes):
    settings = (*JOIN, "cluster.num_nodes=5", "cluster.host_memory_gib=100000", "output_dir=/proc/nowhere")
    command = raylhf.call(
        "ill",
        *("doctor", str(TINY), *settings, "--wait", "1", "--json"),
        environment={**two_nodes.environment, "RAYLHF_EXPECTED_NODES": "n7"},
    )
    assert command.process.returncode == 1, command.story()
    findings = json.loads(command.output)["findings"]
    failed = {(finding["check"], finding["node"]): finding for finding in findings if finding["status"] == "FAIL"}
    assert "2 of cluster.num_nodes=5 nodes" in failed["nodes", ""]["finding"]
    assert failed["nodes", "n7"]["remedy"]
    memory = [finding for (check, _), finding in failed.items() if check == "host memory"]
    assert len(memory) == 2 and all(finding["node"] and finding["remedy"] for finding in memory)
    assert "cannot write into /proc/nowhere" in failed["shared storage", ""]["finding"]


def test_a_node_that_does_not_answer_is_named_at_its_deadline(two_nodes):
    def sleep_on(seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    def fail() -> None:
        raise RuntimeError("broken\nin two lines")

    ray.init(address=two_nodes.environment["RAY_ADDRESS"], log_to_driver=False)
    try:
        awake, asleep = joined_nodes(2, timeout_s=20)
        ask_nodes(sleep_on, [awake, asleep], timeout_s=60, arguments_of=lambda _: (0.0,))  # processes are there now
        started = time.monotonic()
        answers = ask_nodes(
            sleep_on, [awake, asleep], timeout_s=5, arguments_of=lambda node: (600.0 if node is asleep else 0.0,)
        )
        assert time.monotonic() - started < 15
        assert (answers[awake.name].value, answers[awake.name].problem) == ("awake", "")
        assert answers[asleep.name].problem == "no answer within 5 s"
        assert ask_nodes(fail, [awake], timeout_s=60)[awake.name].problem == "RuntimeError: broken"
        gone = RayNode("gone", "0" * 56, "127.0.0.9")
        assert ask_nodes(sleep_on, [gone], timeout_s=20, arguments_of=lambda _: (0.0,))["gone"].problem
    finally:
        ray.shutdown()
