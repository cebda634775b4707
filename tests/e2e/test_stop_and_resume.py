"""Ctrl-C and SIGTERM save and end everything; the same command goes on as if nothing had happened."""

import contextlib
import json
import re
import signal

import psutil
import pytest
from command_line import END_S, TEST_S, numbers
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(TEST_S)
NUM_STEPS = 6
PROMPTS_PER_STEP, NUM_PROMPTS = 12, 16
SETTINGS = (
    f"num_steps={NUM_STEPS}",
    "checkpoint.every_steps=1",
    "learner.zero_stage=3",
    "objective.critic={trunk: own, lr: 1e-3}",
    "objective.kl.control={kind: adaptive, target_per_sequence: 1, horizon: 500}",
    f"rollout.prompts_per_step={PROMPTS_PER_STEP}",  # batches cross the ends of epochs
    "learner.micro_batch_tokens=960",
    "evaluation.responses_per_prompt=2",
    "reward.graph={kind: sum, parts: [{name: vowels, reward: {kind: characters, characters: aeiou}},"
    " {name: form, weight: 0.5, reward: {kind: format}}]}",
)

KILLED_IN = ("rollout", "sync", "checkpoint")
"""Phases of the driver in which it is killed, one after the other."""
KILLED_GRACE_S = 120.0
"""Ray's agents end by themselves, but first try for a while to tell a head that is gone as well."""


@pytest.fixture(scope="session")
def whole(raylhf):
    """A run without interruption."""
    return raylhf.run("whole", *SETTINGS)


@pytest.fixture(scope="session")
def stopped(raylhf):
    """The same run, which gets a SIGTERM when it has done its second step."""
    command = raylhf.start("halves", *SETTINGS)
    command.wait_for(lambda: any(row["step"] >= 2 for row in command.rows()), "step 2")
    command.process.send_signal(signal.SIGTERM)
    command.wait(END_S)
    return command


@pytest.fixture(scope="session")
def killed(raylhf):
    """The same run, whose driver is killed in each of these phases and started again."""
    ended = []
    for phase in KILLED_IN:
        command = raylhf.start("killed", *SETTINGS)
        command.wait_for(lambda c=command, phase=phase: is_in(c, phase), phase)
        command.process.kill()
        command.process.wait()
        ended.append(command)
    return raylhf.run("killed", *SETTINGS), ended


@pytest.fixture(scope="session")
def steps_before_stop(stopped):
    return [row["step"] for row in stopped.rows()]


@pytest.fixture(scope="session")
def resumed(raylhf, stopped, steps_before_stop):
    return raylhf.run("halves", *SETTINGS)


def test_sigterm_saves_the_last_finished_step_and_leaves_no_process(stopped, steps_before_stop):
    assert stopped.process.returncode == 130, stopped.story()
    assert stopped.left_running() == []
    last = steps_before_stop[-1]
    assert 2 <= last < NUM_STEPS
    assert steps_before_stop == list(range(last + 1))
    checkpoints = stopped.folder / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.iterdir()) == [f"step_{last - 1}", f"step_{last}"]
    assert json.loads((checkpoints / f"step_{last}" / "driver.json").read_text())["step"] == last
    assert "stopped on request" in stopped.output
    assert not (stopped.folder / "export").exists()


def test_a_resumed_run_is_equal_to_the_bit_to_one_that_was_never_stopped(whole, resumed, steps_before_stop):
    assert whole.process.returncode == 0, whole.story()
    assert resumed.process.returncode == 0, resumed.story()
    assert f"resuming from step_{steps_before_stop[-1]} ..." in resumed.output
    assert [row["step"] for row in resumed.rows()] == list(range(NUM_STEPS + 1))
    assert numbers(resumed) == numbers(whole)
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_run_whose_driver_is_killed_again_and_again_ends_with_the_same_numbers(raylhf, whole, killed):
    command, ended = killed
    assert command.process.returncode == 0, command.story()
    assert [left for each in ended for left in each.left_running(KILLED_GRACE_S)] == [], "outlives a killed driver"
    assert numbers(command) == numbers(whole)
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (whole, command))
    assert all(one[name].equal(other[name]) for name in one)
    audit = raylhf.call("audit_of_killed", "audit", str(command.folder))
    assert audit.process.returncode == 0, audit.story()


def test_kl_coefficient_and_data_position_move_through_the_stop(resumed):
    rows = resumed.rows()[1:]
    assert [row["data/epoch"] for row in rows] == [
        PROMPTS_PER_STEP * step / NUM_PROMPTS for step in range(1, NUM_STEPS + 1)
    ]
    coefficients = [row["kl/coef"] for row in rows]
    assert len(set(coefficients)) == NUM_STEPS, coefficients


def test_engine_and_learner_agree_with_partitioned_weights_and_after_resuming(resumed):
    for row in resumed.rows()[1:]:
        assert row["mismatch/abs_dlogprob_mean"] < 1e-3
        assert row["policy/first_ratio_error"] < 1e-3


def test_parts_of_the_reward_and_the_critics_own_gradient_are_logged(whole):
    first, *rows = whole.rows()
    for part in ("vowels", "form"):
        assert first[f"eval/part/{part}_mean"] >= 0
        assert all(row[f"reward/part/{part}_mean"] >= 0 for row in rows)
    assert all(row["critic/grad_norm"] > 0 for row in rows)


def test_a_complete_run_is_not_run_again(raylhf, resumed):
    again = raylhf.run("halves", *SETTINGS)
    assert again.process.returncode == 0, again.story()
    assert re.search(r"is complete: .*holds step 6 of 6", again.output)
    assert [row["step"] for row in again.rows()] == list(range(NUM_STEPS + 1))


def test_ctrl_c_while_the_engine_starts_leaves_no_process(raylhf):
    command = raylhf.start("early", "num_steps=50")
    command.wait_for(lambda: any(map(is_engine, command.descendants())), "engine process")
    command.interrupt()
    command.wait(END_S)
    assert command.process.returncode == 130, command.story()
    assert command.left_running() == []
    assert "Traceback" not in command.errors, command.errors
    assert not (command.folder / "checkpoints").exists()
    assert not list(raylhf.place.glob("raylhf-*")), "the folder with Ray's token is left"


def test_sigterm_while_ray_starts_leaves_no_process(raylhf):
    command = raylhf.start("earlier", "num_steps=50")
    command.wait_for(lambda: any(map(is_ray, command.descendants())), "Ray's first process")
    command.process.send_signal(signal.SIGTERM)
    command.wait(END_S)
    assert command.process.returncode == 130, command.story()
    assert command.left_running() == []
    assert "Traceback" not in command.errors, command.errors


def is_in(command, phase):
    """Whether the driver that runs now is in this phase."""
    file = command.folder / "status.json"
    if not file.exists():
        return False
    status = json.loads(file.read_text())
    return status["phase"] == phase and status["pid"] == command.process.pid


def is_engine(process):
    """Whether this is an engine core: as Python starts it, or under the title that it gives itself."""
    return any("spawn_main" in part or part.startswith("VLLM::") for part in command_line_of(process))


def is_ray(process):
    """Whether this is the process that Ray starts first."""
    return any("gcs_server" in part for part in command_line_of(process))


def command_line_of(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
