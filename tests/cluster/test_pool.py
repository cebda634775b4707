"""Workers that come and go, with stand-ins for the processes: what they answer is set by hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from raylhf.cluster import pool as module
from raylhf.cluster.actors import Identity, Outcome, Trouble, WorkerError
from raylhf.cluster.health import Health
from raylhf.cluster.pool import Ticket, WorkerPool

DIED = Outcome(trouble=Trouble.DIED, reason="gone")
MISTAKE = Outcome(trouble=Trouble.MISTAKE, reason="no such model")
SILENCE_S, START_S = 60.0, 600.0


class Actor:
    """A process. Calls are answered when `outcomes` has something for their method."""

    def __init__(self, number):
        self.number = number
        self.is_killed = False
        self.outcomes: dict[str, Outcome] = {"identity": Outcome(Identity("node", "10.0.0.1", 1))}
        self.identity = SimpleNamespace(remote=lambda: (self, "identity"))
        self.call = SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda method, *_args, **_kwargs: (self, method))
        )


class Processes:
    """Launches actors, and takes down what the pool tells."""

    role = "rollout"
    log_folder = None

    def __init__(self):
        self.actors: list[Actor] = []
        self.losses: list[Any] = []
        self.now = 1000.0
        self.room = 100
        self.asked: list[int] = []
        self.gone: list[int] = []

    def join(self, number):
        self.asked.append(number)
        return number < self.room

    def launch(self, number, *_):
        self.actors.append(Actor(number))
        return self.actors[-1]

    def newest(self, number):
        return next(actor for actor in reversed(self.actors) if actor.number == number)

    def answer(self, **outcomes):
        for actor in self.actors:
            actor.outcomes |= outcomes


@pytest.fixture
def started(monkeypatch):
    """started(size, serving=True) -> (pool, processes)."""

    def take_finished(pending, **_):
        ended = {name: actor.outcomes.pop(method, None) for name, (actor, method) in pending.items()}
        for name in [name for name, outcome in ended.items() if outcome is not None]:
            del pending[name]
        return {name: outcome for name, outcome in ended.items() if outcome is not None}

    monkeypatch.setattr(module, "take_finished", take_finished)
    monkeypatch.setattr(module, "kill", lambda actor: setattr(actor, "is_killed", True))

    def build(size, *, serving=True, max_losses=3):
        processes = Processes()
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: processes.now))
        pool = WorkerPool(
            processes,  # type: ignore[arg-type]
            lambda number: ((), {}),
            size=size,
            silence_s=SILENCE_S,
            start_timeout_s=START_S,
            max_losses=max_losses,
            on_loss=processes.losses.append,
            join=processes.join,
            leave=processes.gone.append,
        )
        if serving:
            serve(pool, processes)
        return pool, processes

    return build


def serve(pool, processes):
    processes.answer(start=Outcome({}))
    pool.poll()
    for number in pool.up():
        pool.refreshed(number)


def test_a_worker_serves_after_it_has_started_and_was_refreshed(started):
    pool, processes = started(2, serving=False)
    assert list(pool.start_references()) == ["rollout 0", "rollout 1"]
    assert pool.poll() == [] and pool.up() == []
    processes.actors[1].outcomes["start"] = Outcome({})
    pool.poll()
    assert (pool.up(), pool.newcomers(), pool.serving()) == ([1], [1], [])
    pool.refreshed(1)
    assert (pool.newcomers(), pool.serving()) == ([], [1])


def test_a_lost_worker_is_replaced_under_its_number_and_serves_when_refreshed(started):
    pool, processes = started(2)
    before = pool.ticket(0)
    processes.actors[0].outcomes["ping"] = DIED
    processes.now += 20  # it is asked whether it is there
    pool.poll()
    assert pool.poll() == [0]
    assert processes.actors[0].is_killed and pool.members[0].health is Health.RESTARTING
    assert (pool.ticket(0), before) == (Ticket(0, 2), Ticket(0, 1))
    assert pool.num_restarts == 1
    loss = processes.losses[0]
    assert (loss.name, loss.reason, loss.is_extra) == ("rollout 0", "gone", False)
    pool.lose_if_current(before, "late news of the one before")
    assert len(processes.losses) == 1
    processes.newest(0).outcomes["start"] = Outcome({})
    pool.poll()
    assert pool.newcomers() == [0]
    pool.refreshed(0)
    assert sorted(pool.serving()) == [0, 1]


def test_one_loss_too_many_without_progress_ends_the_run(started):
    pool, _ = started(1, max_losses=2)
    pool.lose(0, "first")
    pool.progressed()
    pool.lose(0, "second")
    pool.lose(0, "third")
    with pytest.raises(WorkerError, match="lost 3 times without a finished step.*max_restarts=2.*fourth"):
        pool.lose(0, "fourth")


def test_silence_makes_a_worker_suspect_and_then_lost_unless_nobody_looked(started):
    pool, processes = started(2)
    processes.actors[1].outcomes["ping"] = Outcome()
    for _ in range(3):
        processes.now += 10  # asked at the first
        pool.poll()
    assert pool.serving() == [0, 1]
    processes.now += 1000  # the run learnt meanwhile
    pool.poll()
    assert pool.serving() == [0, 1]
    lost = []
    for _ in range(6):
        processes.actors[1].outcomes["ping"] = Outcome()
        processes.now += 10
        lost += pool.poll()
        if pool.members[0].health is Health.SUSPECT:
            assert pool.serving() == [1]
    assert lost == [0] and "hangs" in processes.losses[0].reason


def test_a_worker_that_does_not_start_in_time_is_lost(started):
    pool, processes = started(1, serving=False)
    processes.now += START_S + 1
    assert pool.poll() == [0] and "did not start within 600 s" in processes.losses[0].reason


def test_a_mistake_in_the_settings_ends_the_run_at_the_first_start_only(started):
    pool, processes = started(1, serving=False)
    processes.actors[0].outcomes["start"] = MISTAKE
    with pytest.raises(ValueError, match="rollout 0, start: no such model"):
        pool.poll()

    pool, processes = started(1)
    pool.lose(0, "gone")
    processes.newest(0).outcomes["start"] = MISTAKE
    assert pool.poll() == [0] and processes.losses[-1].reason == "no such model"
    assert pool.ticket(0).launch == 3

    pool, processes = started(1)
    pool.resize(2)
    processes.newest(1).outcomes["start"] = MISTAKE
    pool.poll()
    assert list(pool.members) == [0] and processes.losses[-1].is_extra


def test_workers_that_join_are_given_up_until_they_have_served(started):
    pool, processes = started(1)
    pool.resize(3)
    pool.lose(2, "no room on its node")
    assert list(pool.members) == [0, 1] and processes.newest(2).is_killed
    serve(pool, processes)
    assert pool.serving() == [0, 1]
    pool.lose(1, "gone")
    assert list(pool.members) == [0, 1] and [loss.is_extra for loss in processes.losses] == [True, False]


def test_those_that_do_not_serve_leave_first_and_then_those_with_the_highest_numbers(started):
    pool, processes = started(4)
    pool.lose(1, "gone")
    pool.resize(3)
    assert list(pool.members) == [0, 2, 3] and processes.newest(1).is_killed
    pool.resize(2)
    assert list(pool.members) == [0, 2] and processes.newest(3).is_killed


def test_a_number_that_comes_back_has_other_tickets_than_before(started):
    pool, processes = started(2)
    before = pool.ticket(1)
    pool.resize(1)
    pool.lose_if_current(before, "its call ended with it")
    pool.resize(2)
    pool.lose_if_current(before, "its call ended with it")
    assert processes.losses == [] and pool.ticket(1) == Ticket(1, 2)


def test_those_without_room_are_awaited_and_launched_in_the_midst_of_a_step_when_there_is_some(started):
    pool, processes = started(2)
    processes.room = 3
    pool.resize(5)
    assert (sorted(pool.members), pool.awaited, pool.size) == ([0, 1, 2], {3, 4}, 5)
    processes.room = 4
    pool.poll()
    assert 3 not in pool.members  # looked at a moment ago
    processes.now += 1
    pool.poll()
    assert (sorted(pool.members), pool.awaited, pool.size) == ([0, 1, 2, 3], {4}, 5)
    assert pool.members[3].is_extra and processes.gone == []


def test_who_is_awaited_leaves_first_and_is_not_asked_for_any_longer(started):
    pool, processes = started(2)
    processes.room = 2
    pool.resize(4)
    assert pool.awaited == {2, 3}
    pool.resize(3)
    assert (sorted(pool.members), pool.awaited, processes.gone) == ([0, 1], {2}, [3])
    pool.resize(1)
    assert (sorted(pool.members), pool.awaited, processes.gone) == ([0], set(), [3, 1, 2])
    processes.now, processes.room, processes.asked = processes.now + 1, 100, []
    pool.poll()
    assert processes.asked == [] and pool.size == 1


def test_a_newcomer_that_is_lost_frees_its_room_and_the_others_stay_awaited(started):
    pool, processes = started(1)
    processes.room = 2
    pool.resize(3)
    pool.lose(1, "its node has no disk")
    assert (sorted(pool.members), pool.awaited, processes.gone, pool.size) == ([0], {2}, [1], 2)
    pool.lose(0, "gone")
    assert processes.gone == [1]  # another takes its place


def test_the_end_kills_all_processes(started):
    pool, processes = started(2)
    pool.kill()
    assert all(actor.is_killed for actor in processes.actors)
