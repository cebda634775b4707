"""Where workers go: with stand-ins for Ray's placement groups, and once with the real ones and GPUs by name only."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from raylhf.cluster import placement as module
from raylhf.cluster.actors import Launcher, StopRequestedError, WorkerError
from raylhf.cluster.placement import RolePlacement, reserve
from raylhf.cluster.session import ray_session
from raylhf.config import RunConfig
from raylhf.config.cluster import ClusterConfig
from raylhf.config.placement import COLOCATED, Role, reserved_roles

COLOCATED_SETTINGS: dict[str, Any] = {
    "name": "x",
    "num_steps": 1,
    "model": {"path": "tiny"},
    "data": {"path": "p"},
    "rollout": {"prompts_per_step": 8, "num_gpus": 0.4, "resources": {"fast": 1}},
    "reward": {"graph": {"kind": "format"}},
    "learner": {"num_gpus": 0.6, "num_cpus": 1.0, "resources": {"fast": 2, "disk": 1}},
}


class Groups:
    """Ray's placement groups: `asked` and `freed` in order. `room` bundles are free; waits take no time of ours."""

    def __init__(self):
        self.room = 100
        self.asked: list[tuple[int, str]] = []
        self.freed: list[int] = []
        self.waits: list[int] = []
        self.now = 0.0

    def ask(self, bundles, strategy):
        group = SimpleNamespace(number=len(self.asked), size=0)
        self.asked.append((len(bundles), strategy))

        def place():
            if not group.size and len(bundles) <= self.room:
                group.size = len(bundles)
                self.room -= group.size
            return bool(group.size)

        def wait(seconds):
            self.waits.append(group.number)
            self.now += 0 if place() else seconds
            return bool(group.size)

        group.wait = wait
        place()
        return group

    def free(self, group):
        self.freed.append(group.number)
        self.room += group.size


@pytest.fixture
def groups(monkeypatch):
    made = Groups()
    monkeypatch.setattr(module, "placement_group", made.ask)
    monkeypatch.setattr(module, "remove_placement_group", made.free)
    monkeypatch.setattr(module, "PlacementGroupSchedulingStrategy", lambda group, placement_group_bundle_index: group)
    monkeypatch.setattr(module, "describe_nodes", lambda: "2 CPU / 0 GPU")
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def go_on():
    return False


def test_those_that_stay_share_a_group_and_each_that_may_leave_has_its_own(groups):
    role = Role("rollout", 4, 1.0, 0.0, placement="SPREAD", num_apart=2)
    place = reserve((role,), timeout_s=10, should_stop=go_on)["rollout"]
    assert groups.asked == [(2, "SPREAD"), (1, "SPREAD"), (1, "SPREAD")]
    chosen = [place.options(number)["scheduling_strategy"].number for number in range(4)]
    assert chosen == [0, 0, 1, 2]


def test_who_leaves_frees_its_bundle_and_can_come_back(groups):
    place = reserve((Role("rollout", 3, 1.0, 0.0, num_apart=2),), timeout_s=10, should_stop=go_on)["rollout"]
    groups.room = 0
    place.give_back(0)
    place.give_back(2)
    assert groups.freed == [2]  # 2 had a group of its own; that of 0 stays for it
    assert place.take(0) and place.take(1) and len(groups.asked) == 3
    assert place.take(2) and groups.asked[3:] == [(1, "PACK")]
    place.remove()
    assert sorted(groups.freed) == [0, 1, 2, 3]


def test_what_has_no_room_stays_asked_for_until_a_node_comes_and_is_waited_for_a_moment_only(groups):
    place = RolePlacement(Role("rollout", 1, 1.0, 0.0))
    groups.room = 0
    assert not place.take(1) and not place.take(1) and not place.take(2)
    assert groups.asked == [(1, "PACK")] * 3 and groups.freed == []
    assert groups.now == 2  # seconds, one for each that is new
    groups.room = 1
    assert place.take(1) and not place.take(2) and groups.now == 2
    assert place.options(1)["scheduling_strategy"].number == 1
    place.give_back(2)
    assert groups.freed == [2]
    place.give_back(1)
    assert place.take(2) and groups.asked[3:] == [(1, "PACK")]


def test_a_run_starts_with_those_that_stay_and_the_rest_remains_asked_for(groups):
    groups.room = 4  # those that the run can start without take nobody's place
    roles = (Role("rollout", 4, 1.0, 0.0, num_apart=2), Role("learner", 1, 0.5, 0.0))
    place = reserve(roles, timeout_s=1000, should_stop=go_on)["rollout"]
    assert place.num_ready() == 3 and groups.freed == []
    assert module.FREE_WAIT_S <= groups.now <= module.FREE_WAIT_S + module.SLICE_S
    groups.room = 1
    assert place.take(3) and place.num_ready() == 4


def test_a_role_that_reserves_nothing_goes_anywhere(groups):
    place = RolePlacement(Role("rollout", 2, 0.0, 0.0))
    assert place.take(7) and place.options(7) == {} and groups.asked == []


def test_the_largest_workers_are_reserved_before_the_others(groups):
    roles = (Role("rollout", 3, 0.5, 0.0), Role("reward", 5, 1.0, 0.0), Role("learner", 2, 1.0, 4.0))
    assert list(reserve(roles, timeout_s=10, should_stop=go_on)) == ["learner", "reward", "rollout"]
    assert [count for count, _ in groups.asked] == [2, 5, 3] and groups.waits == [0, 1, 2]


def test_what_does_not_become_free_ends_the_wait_of_all_roles_together(groups):
    groups.room = 2
    roles = (
        Role("learner", 2, 1.0, 1.0),
        Role("reward", 3, 0.5, 0.0, placement="SPREAD"),
        Role("rollout", 1, 0.2, 0.0),
    )
    with pytest.raises(WorkerError, match="3 x one reward.*could not be reserved.*placement SPREAD.*2 CPU / 0 GPU"):
        reserve(roles, timeout_s=10, should_stop=go_on)
    assert 10 < groups.now < 12 and len(groups.asked) == 2


def test_a_request_to_stop_ends_the_wait(groups):
    groups.room = 0
    with pytest.raises(StopRequestedError):
        reserve((Role("reward", 3, 0.5, 0.0),), timeout_s=1000, should_stop=lambda: groups.now > 2)
    assert groups.now < 5


def test_rollout_and_learner_that_share_a_gpu_are_reserved_as_one():
    both, reward = reserved_roles(RunConfig.model_validate(COLOCATED_SETTINGS), num_rollout=1)
    assert (both.name, both.replicas, reward.name) == (COLOCATED, 1, "reward")
    assert both.bundle == {"CPU": 1.5, "GPU": 1.0, "fast": 3, "disk": 1}


@pytest.mark.parametrize(("size", "reserved", "apart"), [(1, 2, 0), (2, 2, 0), (3, 3, 1)])
def test_what_is_reserved_at_the_start_follows_the_number_that_starts(size, reserved, apart):
    rollout = {"prompts_per_step": 8, "replicas": 3, "min_replicas": 2}
    config = RunConfig.model_validate(COLOCATED_SETTINGS | {"rollout": rollout, "learner": {}})
    role = next(role for role in reserved_roles(config, num_rollout=size) if role.name == "rollout")
    assert (role.replicas, role.num_apart) == (reserved, apart)


@pytest.mark.timeout(400)
def test_both_processes_of_one_bundle_see_the_same_gpu():
    class Worker:  # in here, so that Ray sends it by value
        def gpus(self):
            return ray.get_gpu_ids()

    shares = {"rollout": 0.3, "learner": 0.6}
    sections = {name: COLOCATED_SETTINGS[name] | {"num_gpus": share, "resources": {}} for name, share in shares.items()}
    config = RunConfig.model_validate(COLOCATED_SETTINGS | sections)
    with ray_session(ClusterConfig(cpus_per_node=2, gpus_per_node=2), env={}):
        # The rest of this one's GPU has room for the rollout worker alone, which Ray would put there by itself.
        other = Launcher("other", Worker, num_cpus=0, num_gpus=0.7, env={}).launch(0)
        assert ray.get(other.call.remote("gpus"), timeout=120) == [0]
        places = reserve(reserved_roles(config, num_rollout=1)[:1], timeout_s=60, should_stop=go_on)
        options_of = places[COLOCATED].options
        actors = [
            Launcher(name, Worker, num_cpus=0.5, num_gpus=share, env={}, options_of=options_of).launch(0)
            for name, share in shares.items()
        ]
        assert ray.get([actor.call.remote("gpus") for actor in actors], timeout=120) == [[1], [1]]
