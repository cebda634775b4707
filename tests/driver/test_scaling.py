"""How many rollout workers a run has."""

import json

import pytest

from raylhf.cli import main
from raylhf.config import RunConfig
from raylhf.driver.scaling import PATIENCE, REST, RolloutScaling, ScalingPolicy, request_size, set_request_aside


def sizes(policy, size, times):
    found = []
    for rollout_s, learn_s in times:
        size = policy.next_size(size, rollout_s=rollout_s, learn_s=learn_s)
        found.append(size)
    return found


def test_a_slow_rollout_gets_workers_one_at_a_time_up_to_the_bound():
    assert sizes(ScalingPolicy(1, 3), 1, [(30.0, 10.0)] * 8) == [1, 1, 2, 2, 2, 3, 3, 3]


def test_an_idle_worker_goes_when_the_others_would_still_be_faster_than_the_learner():
    assert sizes(ScalingPolicy(1, 4), 3, [(3.0, 10.0)] * 6) == [3, 3, 2, 2, 2, 1]
    assert sizes(ScalingPolicy(2, 4), 2, [(0.1, 10.0)] * 6) == [2] * 6
    # With one of two workers less the rollout would take as long as the learner.
    assert sizes(ScalingPolicy(1, 4), 2, [(5.0, 10.0)] * 6) == [2] * 6


def test_one_odd_step_changes_nothing():
    times = [(30.0, 10.0), (30.0, 10.0), (10.0, 10.0)] * 3
    assert sizes(ScalingPolicy(1, 4), 2, times) == [2] * 9


def test_a_steady_load_finds_one_size_and_stays_there():
    """The rollout's time falls with the number of workers: 40 s of work beside 12 s of learning."""
    policy, size, found = ScalingPolicy(1, 8), 1, []
    for _ in range(40):
        size = policy.next_size(size, rollout_s=40.0 / size, learn_s=12.0)
        found.append(size)
    assert found[-1] == 3  # 13.3 s beside 12 s
    assert found == sorted(found)


def test_after_a_rest_the_policy_suggests_again():
    policy = ScalingPolicy(1, 3)
    policy.rest()
    assert sizes(policy, 1, [(30.0, 10.0)] * (REST + PATIENCE)) == [1] * (REST + PATIENCE - 1) + [2]


class Pool:
    """Rollout workers, as far as there is room; those that join serve when `settle` is called."""

    def __init__(self, size, room=100):
        self.members = dict.fromkeys(range(size))
        self.awaited = set()
        self.room = room
        self.settle()

    @property
    def size(self):
        return len(self.members) + len(self.awaited)

    def settle(self):
        self.ready = list(self.members)

    def serving(self):
        return [number for number in self.ready if number in self.members]

    def resize(self, size):
        self.members = dict.fromkeys(range(min(size, max(self.room, len(self.members)))))
        self.awaited = set(range(len(self.members), size))

    def grow(self, room):
        """A node comes."""
        self.room = room
        self.resize(self.size)


@pytest.fixture
def scaling(tmp_path):
    """scaling(room, **settings of rollout) -> (scaling, pool): as at the start of a run."""

    def start(room=100, **settings):
        raw = {
            "name": "x",
            "num_steps": 1,
            "model": {"path": "tiny"},
            "data": {"path": "p"},
            "rollout": {"prompts_per_step": 8, **settings},
            "reward": {"graph": {"kind": "format"}},
        }
        made = RolloutScaling(RunConfig.model_validate(raw), tmp_path)
        return made, Pool(made.start_size, room)

    return start


def steps(made, pool, count, *, rollout_s=100.0):
    """The number of workers after each of some steps, in which those that joined come up."""
    found = []
    for _ in range(count):
        made.follow(pool)
        pool.settle()
        made.after_step(rollout_s=rollout_s, learn_s=1.0)
        found.append(len(pool.members))
    return found


def test_without_bounds_only_a_request_changes_the_size(scaling, tmp_path):
    made, pool = scaling(replicas=2)
    assert steps(made, pool, 2 * PATIENCE) == [2] * 2 * PATIENCE
    request_size(tmp_path, 4)
    assert steps(made, pool, 2) == [4, 4]


def test_a_resumed_run_starts_with_what_its_settings_say_and_adds_the_rest(scaling, tmp_path, caplog):
    request_size(tmp_path, 4)
    made, pool = scaling(replicas=2, room=3)
    assert made.start_size == 2
    assert "scale.json asks for 4 rollout workers instead of rollout.replicas=2" in caplog.text
    assert steps(made, pool, 3) == [3, 3, 3]
    assert caplog.text.count("1 of 4 rollout workers wait for room") == 1 and caplog.text.count("-> 4") == 1
    request_size(tmp_path, 1)
    made, pool = scaling(replicas=2)
    assert made.start_size == 1 and steps(made, pool, 1) == [1]


def test_a_request_counts_once_and_the_policy_goes_on_from_it(scaling, tmp_path):
    made, pool = scaling(replicas=2, max_replicas=5)
    request_size(tmp_path, 3)
    assert steps(made, pool, PATIENCE + 2) == [3, 3, 3, 3, 4]  # the step in which it joins tells nothing
    request_size(tmp_path, 3)
    assert steps(made, pool, 1) == [3]


def test_a_request_is_held_within_what_the_settings_allow(scaling, tmp_path, caplog):
    request_size(tmp_path, 9)
    assert scaling(replicas=2, max_replicas=3)[0].size == 3
    assert "asks for 9 rollout workers; the settings allow 3" in caplog.text
    assert scaling(replicas=2, placement="STRICT_SPREAD")[0].size == 2
    request_size(tmp_path, 1)
    assert scaling(replicas=2, max_replicas=3)[0].size == 2


def test_while_workers_start_the_policy_waits(scaling):
    made, pool = scaling(replicas=1, max_replicas=4)
    steps(made, pool, PATIENCE)
    for _ in range(3 * PATIENCE):  # the second worker takes long to start
        made.follow(pool)
        made.after_step(rollout_s=100.0, learn_s=1.0)
    assert made.size == len(pool.members) == 2
    pool.settle()
    assert steps(made, pool, PATIENCE + 1)[-1] == 3


def test_a_worker_that_was_lost_in_the_step_spoils_its_times(scaling):
    made, pool = scaling(replicas=2, max_replicas=4)
    for _ in range(3 * PATIENCE):
        pool.settle()
        made.follow(pool)
        pool.ready.pop()
        made.after_step(rollout_s=100.0, learn_s=1.0)
    assert made.size == 2


def test_after_a_join_that_was_given_up_a_request_acts_at_once_and_the_policy_after_a_while(scaling, tmp_path):
    made, pool = scaling(replicas=1, max_replicas=3)
    request_size(tmp_path, 2)
    made.follow(pool)
    del pool.members[1]  # it does not come up
    assert steps(made, pool, REST + PATIENCE) == [1] * (REST + PATIENCE)
    assert steps(made, pool, 1) == [2]

    made, pool = scaling(replicas=1)
    made.follow(pool)
    del pool.members[1]
    assert steps(made, pool, 2) == [1, 1]
    request_size(tmp_path, 2)
    assert steps(made, pool, 1) == [2]


def test_what_a_slow_rollout_asks_for_stands_until_a_node_comes_and_is_no_more_than_one_worker(scaling, caplog):
    made, pool = scaling(replicas=1, max_replicas=4, room=1)
    assert set(steps(made, pool, 5 * PATIENCE)) == {1}
    assert pool.awaited == {1} and caplog.text.count("wait for room") == 1
    pool.grow(2)
    assert steps(made, pool, 1) == [2] and pool.awaited == set()


def test_what_was_asked_for_is_withdrawn_by_a_request_or_when_fewer_would_do(scaling, tmp_path):
    made, pool = scaling(replicas=2, room=2)
    request_size(tmp_path, 4)
    assert steps(made, pool, PATIENCE) == [2] * PATIENCE and pool.awaited == {2, 3}
    request_size(tmp_path, 2)
    assert steps(made, pool, 1) == [2] and pool.awaited == set()

    made, pool = scaling(replicas=2, min_replicas=1, max_replicas=4, room=2)
    request_size(tmp_path, 4)
    assert steps(made, pool, PATIENCE + 1) == [2] * (PATIENCE + 1) and pool.awaited == {2, 3}
    assert steps(made, pool, PATIENCE, rollout_s=1.0) == [2] * PATIENCE and pool.awaited == {2, 3}
    assert steps(made, pool, PATIENCE + 1, rollout_s=0.1)[-1] == 1 and pool.awaited == set()


def test_one_that_joins_in_the_midst_of_a_step_spoils_its_times(scaling):
    made, pool = scaling(replicas=1, max_replicas=4)
    for size in range(2, 2 + PATIENCE):
        made.follow(pool)
        pool.members[size - 1] = None
        pool.settle()
        made.after_step(rollout_s=100.0, learn_s=1.0)
    assert made.size == 1


def test_of_those_that_are_awaited_only_one_that_did_not_come_up_is_given_up(scaling, tmp_path):
    made, pool = scaling(replicas=1, room=1)
    request_size(tmp_path, 4)
    made.follow(pool)
    pool.grow(2)
    del pool.members[1]  # it does not come up
    pool.room = 1
    assert steps(made, pool, 2) == [1, 1] and pool.size == 3


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"rollout": 0}', '{"rollout": -1}', '{"rollout": Infinity}', '{"rollout": "3"}']
)
def test_a_file_that_is_no_request_is_left_alone(scaling, tmp_path, caplog, text):
    (tmp_path / "scale.json").write_text(text)
    made, pool = scaling(replicas=2)
    assert steps(made, pool, 3) == [2] * 3
    assert caplog.text.count("is not a request of raylhf scale") == 1


def test_a_request_that_cannot_be_read_is_left_alone(scaling, tmp_path, caplog):
    (tmp_path / "scale.json").mkdir()
    assert scaling(replicas=2)[0].size == 2
    assert "is not a request of raylhf scale" in caplog.text


def test_a_run_that_begins_anew_knows_nothing_of_earlier_requests(scaling, tmp_path):
    set_request_aside(tmp_path)
    request_size(tmp_path, 4)
    set_request_aside(tmp_path)
    assert scaling(replicas=2)[0].size == 2
    assert (tmp_path / "scale.1.json").is_file()


@pytest.fixture
def run_folder(tmp_path):
    """run_folder("max_replicas: 3") -> the folder of a run with these rollout settings."""

    def write(*settings):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
        lines = ["name: x", "num_steps: 1", "model: {path: tiny}", f"data: {{path: {tmp_path / 'prompts.jsonl'}}}"]
        lines += [
            "reward: {graph: {kind: format}}",
            "evaluation: {every_steps: 0}",
            "cluster: {cpus_per_node: 4, gpus_per_node: 1}",
            *(["learner: {num_gpus: 0.6}"] if "num_gpus: 0.4" in settings else []),
            "rollout:",
            "  prompts_per_step: 8",
        ]
        (tmp_path / "config.yaml").write_text("\n".join([*lines, *(f"  {line}" for line in settings)]))
        return tmp_path

    return write


def test_the_command_leaves_a_request(run_folder, capsys):
    folder = run_folder()
    assert main(["scale", str(folder), "--rollout", "4"]) == 0
    assert json.loads((folder / "scale.json").read_text()) == {"rollout": 4}
    assert "4 rollout workers" in capsys.readouterr().out
    assert [file.name for file in folder.glob(".scale*")] == []


@pytest.mark.parametrize(
    ("settings", "size", "sentence"),
    [
        (("max_replicas: 3",), "4", "outside of rollout.min_replicas=1 to rollout.max_replicas=3"),
        ((), "0", "must be 1 or more"),
        (("num_gpus: 0.4",), "2", "--rollout 2 asks for rollout workers that come and go, but weights travel by ipc"),
        (
            ("replicas: 2", "placement: STRICT_SPREAD"),
            "3",
            "which holds only for workers that are there from the start",
        ),
    ],
)
def test_a_number_that_the_run_cannot_have_is_refused(run_folder, capsys, settings, size, sentence):
    assert main(["scale", str(run_folder(*settings)), "--rollout", size]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["scale", str(tmp_path), "--rollout", "2"]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
