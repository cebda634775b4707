"""Workers that are killed while a run goes on: others take their place, and the run ends with the same numbers."""

import re
import signal
import time
from contextlib import contextmanager

import psutil
import pytest
from command_line import TEST_S, WAIT_S, numbers
from ray_nodes import RayNodes
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(TEST_S)
NUM_STEPS = 10
SETTINGS = (
    f"num_steps={NUM_STEPS}",
    "checkpoint.every_steps=2",
    "rollout.replicas=2",
    "rollout.prompts_per_step=12",
    "learner.micro_batch_tokens=960",
    "cluster.cpus_per_node=4",
    "cluster.worker_timeout_s=60",
    "reward.graph={kind: whiten, reward: {kind: sum, parts: [{name: vowels, reward: {kind: characters,"
    " characters: aeiou}}, {name: form, weight: 0.5, reward: {kind: format}}]}}",
)
PINNED = (
    "cluster.address=auto",
    "cluster.num_nodes=4",
    "cluster.cpus_per_node=2",
    "learner.resources={learners: 1}",
    "reward.resources={rewards: 1}",
    "rollout.resources={rollouts: 1}",
    "rollout.placement=STRICT_PACK",
)
ASYNCHRONOUS = ("rollout.max_staleness=2", "reward.graph={kind: characters, characters: aeiou}")
KILLS = (
    ("rollout-0", signal.SIGKILL),
    ("reward-0", signal.SIGKILL),
    ("learner-1", signal.SIGKILL),
    ("engine of rollout-1", signal.SIGKILL),
)
"""Who is killed when another step is done."""


@pytest.fixture(scope="module")
def calm(raylhf):
    return raylhf.run("calm", *SETTINGS)


@pytest.fixture(scope="module")
def scaled(raylhf):
    """The same run, which begins with one rollout worker, gets two more, and loses two again."""
    command = raylhf.start("scaled", *SETTINGS, "rollout.replicas=1")
    command.wait_for(lambda: any(row["step"] >= 1 for row in command.rows()), "step 1")
    scale(raylhf, command, 3)
    command.wait_for(lambda: "rollout workers: 1 -> 3" in command.errors, "the request")
    steps = len(command.rows())
    command.wait_for(lambda: len(command.rows()) > steps, "the launch of two more")
    logs = [command.folder / "logs" / f"rollout-{number}.log" for number in (1, 2)]
    with halted(find(command, "learner-0")):
        wait_until(lambda: all(log.exists() and "is ready" in log.read_text() for log in logs), "their engines")
    command.wait_for(lambda: any(row.get("rollout/num_workers") == 3 for row in command.rows()), "three workers")
    scale(raylhf, command, 1)
    command.wait()
    return command


def scale(raylhf, command, size):
    with halted(find(command, "learner-0")):
        asked = raylhf.call(f"scale_{size}", "scale", str(command.folder), "--rollout", str(size))
    assert asked.process.returncode == 0, asked.story()


@contextmanager
def halted(process):
    """A learner that stands still keeps the run in its step, which takes less time than the start of an engine."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@pytest.fixture(scope="module")
def shaken(raylhf):
    """The same run, in which one worker after the other is killed."""
    command = raylhf.start("shaken", *SETTINGS)
    for number, (who, signal_number) in enumerate(KILLS):
        step, reports = 1 + number, len(crash_reports(command))
        command.wait_for(lambda step=step: any(row["step"] >= step for row in command.rows()), f"step {step}")
        find(command, who).send_signal(signal_number)
        command.wait_for(lambda reports=reports: len(crash_reports(command)) > reports, f"report on {who}")
    command.wait()
    return command


@pytest.fixture(scope="module")
def ahead(raylhf):
    """An asynchronous run, in which a rollout worker is killed, and a learner two steps later."""
    command = raylhf.start("ahead", *SETTINGS, *ASYNCHRONOUS)
    command.wait_for(lambda: any(row["step"] >= 2 for row in command.rows()), "step 2")
    find(command, "rollout-0").send_signal(signal.SIGKILL)
    step = command.rows()[-1]["step"] + 2
    command.wait_for(lambda: any(row["step"] >= step for row in command.rows()), f"step {step}")
    find(command, "learner-1").send_signal(signal.SIGKILL)
    command.wait()
    return command


@pytest.fixture(scope="module")
def spread(raylhf):
    """The same run on four Ray nodes, with each role on nodes of its own; a node of rollout workers is lost."""
    with RayNodes() as nodes:
        nodes.add("learners", learners=2)
        nodes.add("rewards", rewards=1)
        nodes.add("rollouts A", rollouts=2)
        command = raylhf.start("spread", *SETTINGS, *PINNED, environment=nodes.environment)
        command.wait_for(lambda: any(row["step"] >= 2 for row in command.rows()), "step 2")
        nodes.add("rollouts B", rollouts=2)
        nodes.lose("rollouts A")
        command.wait()
    return command


def test_a_run_on_several_nodes_survives_the_loss_of_one_with_the_same_numbers(calm, spread):
    assert spread.process.returncode == 0, spread.story()
    assert numbers(spread) == numbers(calm)
    lost = [report.name for report in crash_reports(spread)]
    assert {"rollout-0", "rollout-1"} == {name[4:].removesuffix(".txt") for name in lost}, lost


def test_the_run_goes_on_to_its_end_and_leaves_no_process(shaken):
    assert shaken.process.returncode == 0, shaken.story()
    assert shaken.left_running() == []
    assert [row["step"] for row in shaken.rows()] == list(range(NUM_STEPS + 1))


def test_its_numbers_and_weights_are_equal_to_the_bit_to_those_of_a_calm_run(calm, shaken):
    assert calm.process.returncode == 0, calm.story()
    assert numbers(shaken) == numbers(calm)
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (calm, shaken))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_run_whose_rollout_workers_come_and_go_has_the_same_numbers(calm, scaled):
    assert scaled.process.returncode == 0, scaled.story()
    assert scaled.left_running() == []
    assert numbers(scaled) == numbers(calm)
    sizes = [int(row["rollout/num_workers"]) for row in scaled.rows() if row["step"]]
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 3, 1), sizes


def test_an_asynchronous_run_keeps_its_bound_and_loses_nothing_with_a_worker_or_a_learner(raylhf, ahead):
    assert ahead.process.returncode == 0, ahead.story()
    assert ahead.left_running() == []
    staleness = [row["rollout/staleness_max"] for row in ahead.rows() if row["step"]]
    assert len(staleness) == NUM_STEPS
    assert staleness[0] == 0 and max(staleness) <= 2 and staleness[1] >= 1, staleness
    lost = {report.name[4:].removesuffix(".txt") for report in crash_reports(ahead)}
    assert lost >= {"rollout-0", "learner-1"}, lost
    audit = raylhf.call("audit_of_ahead", "audit", str(ahead.folder))
    assert audit.process.returncode == 0, audit.story()
    assert re.search(rf"consumed +{NUM_STEPS * 12}\b", audit.output), audit.story()


def test_the_ledger_proves_that_nothing_is_lost_or_doubled(raylhf, shaken):
    audit = raylhf.call("audit_of_shaken", "audit", str(shaken.folder))
    assert audit.process.returncode == 0, audit.story()
    assert "nothing lost, nothing doubled" in audit.output


def test_each_loss_has_a_report_that_names_worker_step_and_prompts(shaken):
    reports = crash_reports(shaken)
    assert len(reports) >= len(KILLS)
    for report in reports:
        text = report.read_text()
        assert re.search(r"^who: +(rollout|reward|learner) \d", text), text
        assert re.search(r"^step: +\d+ steps were done", text, re.MULTILINE), text
        assert re.search(r"^prompts: \d+, ", text, re.MULTILINE), text
        assert "--- process" in text, text


def wait_until(condition, what):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {WAIT_S:g} s"
        time.sleep(0.2)


def crash_reports(command):
    return sorted((command.folder / "crashes").glob("*.txt"))


def find(command, who):
    """The process of a worker, which its log names, or the engine below it."""
    worker = who.removeprefix("engine of ")
    log = (command.folder / "logs" / f"{worker}.log").read_text(errors="replace")
    process = psutil.Process(int(re.findall(r"^--- process (\d+) starts", log, re.MULTILINE)[-1]))
    if worker == who:
        return process
    return next(
        p for p in process.children(recursive=True) if "spawn_main" in " ".join(p.cmdline()) or "VLLM" in p.name()
    )
