"""Whom weights are sent to, and what is done when somebody is lost meanwhile: the driver's logic alone."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from raylhf.cluster.actors import Identity, Outcome, Trouble, WorkerError, WorkersLostError
from raylhf.cluster.pool import Ticket
from raylhf.config import RunConfig
from raylhf.driver import weight_sync
from raylhf.driver.weight_sync import ATTEMPTS, WeightSync

DIED = Outcome(trouble=Trouble.DIED, reason="gone")
FAILED = Outcome(trouble=Trouble.FAILED, reason="connection reset")
SILENT = None


class Pool:
    """Rollout workers. `script[number, method]` holds the outcomes of that call, one after the other, then all is well;
    a worker that is lost stays away."""

    def __init__(self, size, script):
        self.alive, self.script = list(range(size)), script
        self.stale = set(range(size))
        self.have_served: set[int] = set()
        self.lost: dict[int, str] = {}

    def poll(self):
        return []

    def up(self):
        return list(self.alive)

    def ticket(self, number):
        return Ticket(number, 1)

    def submit(self, number, method, *_, **__):
        outcomes = self.script.get((number, method), [])
        return outcomes.pop(0) if outcomes else Outcome(0)

    def lose_if_current(self, ticket, reason):
        if ticket.number in self.alive:
            self.alive.remove(ticket.number)
            self.lost[ticket.number] = reason

    def outdated(self, number):
        self.stale.add(number)

    def refreshed(self, number):
        self.stale.discard(number)
        self.have_served.add(number)

    def newcomers(self):
        return [number for number in self.alive if number not in self.have_served]


class Learners:
    """Two ranks, with a script by method for rank 1."""

    def __init__(self, script):
        self.script = script
        self.world_sizes: list[int] = []

    def name(self, rank):
        return f"learner {rank}"

    def identities(self):
        return {self.name(rank): Identity("node", "10.0.0.1", 1) for rank in range(2)}

    def call_all(self, method, *args, **_):
        if method == "prepare_sender":
            self.world_sizes.append(args[0].keywords["world_size_of_rollout"])
        return [{}, {}]

    def submit_all(self, method, *_):
        outcomes = self.script.get(method, [])
        return {"learner 0": Outcome(1000), "learner 1": outcomes.pop(0) if outcomes else Outcome(1000)}


@pytest.fixture
def sync(monkeypatch):
    """sync(size, rollout script, learner script) -> (sync, pool, learners)."""

    def take_finished(pending, **_):
        ended = {who: outcome for who, outcome in pending.items() if outcome is not SILENT}
        for who in ended:
            del pending[who]
        return ended

    monkeypatch.setattr(weight_sync, "take_finished", take_finished)
    monkeypatch.setattr(weight_sync, "settle", lambda references, timeout_s: take_finished(dict(references)))
    monkeypatch.setattr(weight_sync, "gather", lambda references, **_: list(references.values()))
    monkeypatch.setattr(weight_sync, "SETTLE_S", 0.05)

    def build(size, rollout=None, learner=None):
        raw: dict[str, Any] = {
            "name": "x",
            "num_steps": 1,
            "model": {"path": "tiny"},
            "data": {"path": "p"},
            "rollout": {"prompts_per_step": 8},
            "reward": {"graph": {"kind": "format"}},
            "cluster": {"worker_timeout_s": 0.05},
        }
        pool, learners = Pool(size, rollout or {}), Learners(learner or {})
        return WeightSync(RunConfig.model_validate(raw), cast(Any, pool), cast(Any, learners)), pool, learners

    return build


def send(made, version=1):
    return made.send(version, should_stop=lambda: False)


def test_the_group_is_made_once_and_everybody_serves_after_a_sync(sync):
    made, pool, learners = sync(3)
    for version in (0, 1, 2):
        assert send(made, version)["sync/bytes"] == 1000
    assert learners.world_sizes == [3]
    assert not pool.stale and made.version == 2


def test_who_ended_before_the_sync_keeps_nobody_waiting(sync):
    made, pool, learners = sync(3, {(1, "ping"): [DIED]})
    send(made)
    assert set(pool.lost) == {1} and learners.world_sizes == [2] and not pool.stale & {0, 2}


def test_who_hangs_before_the_sync_is_lost(sync):
    made, pool, learners = sync(2, {(0, "ping"): [SILENT]})
    send(made)
    assert "hangs" in pool.lost[0] and learners.world_sizes == [1]


@pytest.mark.parametrize("method", ["join_transfer", "update_weights"])
@pytest.mark.parametrize("end", [DIED, SILENT])
def test_who_is_lost_on_the_way_is_left_out_of_the_next_attempt(sync, method, end):
    others = {(n, method): [FAILED] for n in (0, 2)}
    made, pool, learners = sync(3, {(1, method): [end]} | others)
    send(made)
    assert set(pool.lost) == {1}
    assert learners.world_sizes == [3, 2]
    assert not pool.stale & {0, 2}


def test_a_failure_without_a_loss_is_tried_again_but_not_for_ever(sync):
    made, pool, learners = sync(2, {(0, "update_weights"): [FAILED]})
    send(made)
    assert learners.world_sizes == [2, 2] and not pool.lost
    made, pool, _ = sync(2, {(0, "update_weights"): [FAILED] * ATTEMPTS})
    with pytest.raises(WorkerError, match=f"none of {ATTEMPTS} attempts came to its end.*connection reset"):
        send(made)
    assert pool.stale == {0, 1}


@pytest.mark.parametrize("method", ["join_transfer", "update_weights"])
def test_who_joins_and_makes_the_sync_fail_is_lost_and_the_others_go_on(sync, method):
    made, pool, learners = sync(2, {(2, method): [FAILED] * ATTEMPTS})
    send(made, 0)
    pool.alive.append(2)
    send(made, 1)
    assert list(pool.lost) == [2] and "connection reset" in pool.lost[2]
    assert learners.world_sizes == [2, 3, 2] and not pool.stale & {0, 1}


def test_who_joins_is_kept_where_somebody_else_was_lost_on_the_way(sync):
    made, pool, learners = sync(2)
    send(made, 0)
    pool.alive.append(2)
    pool.script[0, "update_weights"] = [DIED]
    pool.script[2, "update_weights"] = [FAILED]
    send(made, 1)
    assert list(pool.lost) == [0] and learners.world_sizes == [2, 3, 2]


def test_a_learner_that_died_is_named_and_no_rollout_worker_suffers(sync):
    made, pool, _ = sync(2, {(0, "update_weights"): [SILENT], (1, "update_weights"): [SILENT]}, {"publish": [DIED]})
    with pytest.raises(WorkersLostError) as raised:
        send(made)
    assert raised.value.names == ("learner 1",)
    assert not pool.lost


def test_a_learner_that_hangs_is_lost_when_the_rollout_side_is_done(sync):
    made, pool, _ = sync(2, {(0, "update_weights"): [FAILED]}, {"publish": [SILENT]})
    with pytest.raises(WorkersLostError) as raised:
        send(made)
    assert raised.value.names == ("learner 1",)
    assert not pool.lost


def test_a_request_to_stop_ends_the_wait_for_a_worker(sync):
    made, _, _ = sync(0)
    with pytest.raises(Exception, match="waiting for rollout workers"):
        made.send(1, should_stop=lambda: True)


def test_sizes_count_every_gpu_of_an_engine(sync):
    made, _, learners = sync(2)
    made._config = SimpleNamespace(
        cluster=made._config.cluster,
        rollout=SimpleNamespace(tensor_parallel_size=4),
        weight_transfer="nccl",
    )
    send(made)
    assert learners.world_sizes == [8]
