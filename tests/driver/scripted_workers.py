"""Rollout and reward workers that answer by a script, for tests of the driver's logic."""

from types import SimpleNamespace
from typing import Any

from raylhf.cluster.actors import Outcome, Trouble
from raylhf.cluster.pool import Ticket
from raylhf.config import RunConfig


class Call:
    """A reference of a call that has ended, or (None) never will."""

    def __init__(self, outcome: Outcome | None):
        self.outcome = outcome


class Pool:
    """Workers that answer every call by `answer(number, launch, method, arguments)`."""

    def __init__(self, role, size, answer):
        self.role, self.answer = role, answer
        self.launches = dict.fromkeys(range(size), 1)
        self.calls: list[tuple[int, int, str, Any]] = []

    def serving(self):
        return list(self.launches)

    def ticket(self, number):
        return Ticket(number, self.launches[number])

    def name(self, number):
        return f"{self.role} {number}"

    def submit(self, number, method, argument, *, num_returns, **kwargs):
        self.calls.append((number, self.launches[number], method, kwargs or argument))
        return self.answer(number, self.launches[number], argument, kwargs)

    def lose_if_current(self, ticket, _reason):
        if self.ticket(ticket.number) == ticket:
            self.launches[ticket.number] += 1


class Statistics:
    def __init__(self):
        self.is_observing = False
        self.events: list[str] = []

    def take(self):
        self.events.append("take")
        return True

    def drop(self):
        self.events.append("drop")


DIED = Outcome(trouble=Trouble.DIED, reason="gone")
LOST = Outcome(trouble=Trouble.LOST_DATA, reason="its node is gone")


def well(_number, _launch, _argument, kwargs):
    """What a rollout worker gives."""
    return Call(Outcome("rollouts")), Call(Outcome({"seed": kwargs["seed"]}))


def scored(_number, _launch, rollouts, _kwargs, resample=False):
    if rollouts.outcome is not None and rollouts.outcome.trouble:  # Ray hands the failure on
        return Call(rollouts.outcome), Call(rollouts.outcome)
    summary = {"scores": [1.0], "valid": [True], "resample": [resample], "seconds": 1.0, "sources": []}
    return Call(Outcome("rewards")), Call(Outcome(summary))


def take_finished(pending, *, wait_s=0.5, all_together=True):
    """In the place of the function of that name."""
    ended = {key: call.outcome for key, call in pending.items() if call.outcome is not None}
    for key in ended:
        del pending[key]
    return ended


def scripted_workers(sample, score, *, rollout=None, max_resamples=0, observing=False, num_steps=1, graph=None):
    """What a collection needs of `Workers`."""
    raw: dict[str, Any] = {
        "name": "x",
        "num_steps": num_steps,
        "model": {"path": "tiny"},
        "data": {"path": "p"},
        "rollout": {"prompts_per_step": 8, **(rollout or {})},
        "reward": {"graph": graph or {"kind": "format"}, "max_resamples": max_resamples},
        "cluster": {"step_timeout_s": 0.3},
    }
    statistics = Statistics()
    statistics.is_observing = observing
    return SimpleNamespace(
        config=RunConfig.model_validate(raw),
        rollout=Pool("rollout", 2, sample),
        reward=Pool("reward", 2, score),
        statistics=statistics,
        tend=lambda may_publish=True: False,
    )
