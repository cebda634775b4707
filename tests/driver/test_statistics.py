"""What rewards observe is counted once, whoever is lost: the driver's logic, with reward workers in this process."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from raylhf.cluster.actors import Outcome, Trouble
from raylhf.cluster.health import UP, Health
from raylhf.cluster.pool import Ticket
from raylhf.driver import statistics
from raylhf.driver.statistics import RewardStatistics
from raylhf.rewards.state import RewardState

PLACE = "graph"


class Worker:
    """A reward worker's statistics without a reward."""

    def __init__(self):
        self.state = RewardState()
        self.moments = self.state.register(PLACE, decay=0.9)

    def set_observing(self, is_observing):
        self.state.observing = is_observing

    def take_pending(self):
        return self.state.take_pending()

    def commit(self, merged):
        self.state.commit(merged)
        return self.state.state_dict()

    def needs_commit(self):
        return self.state.needs_commit

    def state_dict(self):
        return self.state.state_dict()

    def load_state_dict(self, saved):
        self.state.load_state_dict(saved)


class Pool:
    """Workers that die at the calls that `deaths` names, and come back empty at the next look at them."""

    role = "reward"

    def __init__(self, size, deaths=()):
        self.deaths = list(deaths)
        self.members = {i: self._fresh(Health.STALE) for i in range(size)}
        self.launches = dict.fromkeys(self.members, 1)

    def _fresh(self, health):
        return SimpleNamespace(health=health, worker=Worker())

    def up(self):
        return [i for i, member in self.members.items() if member.health in UP]

    def serving(self):
        return [i for i, member in self.members.items() if member.health is Health.HEALTHY]

    def name(self, number):
        return f"reward {number}"

    def ticket(self, number):
        return Ticket(number, self.launches[number])

    def submit(self, number, method, *args):
        if (number, method) in self.deaths:
            self.deaths.remove((number, method))
            return Outcome(trouble=Trouble.DIED, reason="gone")
        return Outcome(getattr(self.members[number].worker, method)(*args))

    def lose_if_current(self, ticket, _reason):
        self.launches[ticket.number] += 1
        self.members[ticket.number] = self._fresh(Health.RESTARTING)

    def poll(self):
        for member in self.members.values():
            if member.health is Health.RESTARTING:
                member.health = Health.STALE
        return []

    def refreshed(self, number):
        self.members[number].health = Health.HEALTHY

    def outdated(self, number):
        self.members[number].health = Health.STALE


@pytest.fixture
def shared(monkeypatch):
    """shared(size, deaths) -> (statistics, pool): begun and observing."""
    monkeypatch.setattr(statistics, "settle", lambda references, timeout_s: dict(references))
    monkeypatch.setattr(statistics, "IDLE_S", 0.0)

    def build(size, deaths=()):
        pool = Pool(size)
        config = SimpleNamespace(cluster=SimpleNamespace(worker_timeout_s=1.0), reward=SimpleNamespace(has_state=True))
        made = RewardStatistics(cast(Any, config), cast(Any, pool), lambda: False)
        made.begin()
        made.observe(True)
        pool.deaths = list(deaths)
        return made, pool

    return build


def see(pool, number, scores):
    pool.members[number].worker.state.observe(PLACE, scores)


def committed(state):
    return state[PLACE]["mean"], state[PLACE]["num_commits"]


def test_all_workers_fold_in_what_each_of_them_saw(shared):
    made, pool = shared(2)
    see(pool, 0, np.array([1.0, 2.0]))
    see(pool, 1, np.array([6.0]))
    assert made.take()
    made.commit()
    assert committed(made.state) == (3.0, 1)
    assert all(committed(member.worker.state_dict()) == (3.0, 1) for member in pool.members.values())


def test_a_worker_that_is_lost_with_what_it_saw_is_told(shared):
    made, pool = shared(2, deaths=[(1, "take_pending")])
    see(pool, 0, np.array([1.0]))
    assert not made.take()
    made.drop()
    see(pool, 0, np.array([1.0]))
    assert made.take()
    made.commit()
    assert committed(made.state) == (1.0, 1)


def test_a_worker_that_comes_later_is_given_what_the_others_have(shared):
    made, pool = shared(2, deaths=[(1, "commit")])
    see(pool, 0, np.array([1.0, 5.0]))
    assert made.take()
    made.commit()
    assert pool.serving() == [0]
    pool.poll()
    made.bring_back()
    assert pool.serving() == [0, 1]
    assert pool.members[1].worker.state_dict() == pool.members[0].worker.state_dict() == made.state
    assert pool.members[1].worker.state.observing


def test_a_commit_in_which_all_are_lost_is_done_by_their_successors(shared):
    made, pool = shared(2, deaths=[(0, "commit"), (1, "commit")])
    see(pool, 0, np.array([1.0, 5.0]))
    assert made.take()
    made.commit()
    assert committed(made.state) == (3.0, 1)
    assert pool.launches == {0: 2, 1: 2}


def test_a_suspect_that_missed_the_commit_is_brought_up_to_date_before_it_serves(shared):
    made, pool = shared(2)
    see(pool, 0, np.array([1.0, 5.0]))
    assert made.take()
    pool.members[1].health = Health.SUSPECT
    made.commit()
    assert pool.members[1].health is Health.STALE
    made.bring_back()
    assert pool.members[1].worker.state_dict() == made.state


def test_what_came_in_late_from_a_batch_that_was_given_up_does_not_count(shared):
    made, pool = shared(1)
    see(pool, 0, np.array([100.0]))
    made.observe(True)
    see(pool, 0, np.array([1.0]))
    assert made.take()
    made.commit()
    assert committed(made.state) == (1.0, 1)


def test_saved_statistics_reach_everybody(shared):
    made, pool = shared(2)
    see(pool, 0, np.array([4.0]))
    assert made.take()
    made.commit()
    saved = made.state
    see(pool, 1, np.array([40.0]))
    assert made.take()
    made.commit()
    made.load(saved)
    assert all(member.worker.state_dict() == saved for member in pool.members.values())
    assert not made.needs_commit()
