"""Weights from the learners to the rollout workers that are there at the time."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from raylhf.cluster.actors import (
    ActorGroup,
    Identity,
    Outcome,
    StopRequestedError,
    Trouble,
    WorkerError,
    WorkersLostError,
    gather,
    raise_trouble,
    settle,
    take_finished,
)
from raylhf.cluster.pool import Ticket, WorkerPool
from raylhf.config import RunConfig
from raylhf.driver.roles import weight_sender
from raylhf.driver.timing import timed

PHASE = "weight sync"
IDLE_S = 0.1
ATTEMPTS = 5
"""How often a sync is begun again after rollout workers were lost in it."""
SETTLE_S = 30.0
"""What a worker may take to tell of a deadline that has passed."""


class WeightSync:
    """The transfer between the learners and the rollout workers.

    The group is made of particular processes. When one of them is replaced, or is lost while weights are on their way,
    it is made anew of those that are up, and the whole set is sent again: a worker serves only whole sets.
    """

    def __init__(self, config: RunConfig, rollout: WorkerPool, learner: ActorGroup) -> None:
        self.version = 0
        """Of the weights that were sent last: the number of steps behind them."""
        self._config = config
        self._rollout = rollout
        self._learner = learner
        self._members: tuple[Ticket, ...] = ()
        """The processes that the transfer group is made of."""
        self._problem = ""
        """What went wrong in the last attempt that failed."""
        self._patience_s = config.cluster.worker_timeout_s + SETTLE_S
        """After the first failure, how long the others have: their own waits have a deadline of worker_timeout_s."""

    def send(self, version: int, *, should_stop: Any) -> dict[str, float]:
        """Send the learners' weights to every rollout worker that is up, as `version`, which is read back.

        Raises:
            WorkersLostError: learners are lost.
            WorkerError: no rollout worker came up in time, or the transfer failed again and again.
            StopRequestedError: the user asked to stop while no rollout worker was up.
        """
        seconds = timed()
        for _ in range(ATTEMPTS):
            self._wait_for_workers(should_stop)
            numbers = self._rollout.up()
            tickets = tuple(map(self._rollout.ticket, numbers))
            if (self._members == tickets or self._connect(tickets)) and (num_bytes := self._send(version)) is not None:
                for number in numbers:
                    self._rollout.refreshed(number)
                self.version = version
                elapsed = seconds()
                return {"time/sync_s": elapsed, "sync/bytes": num_bytes, "sync/gb_per_s": num_bytes / elapsed / 1e9}
            self._members = ()
            self._lose_newcomers(tickets)
        raise WorkerError(f"{PHASE}: none of {ATTEMPTS} attempts came to its end; the last time: {self._problem}")

    def _wait_for_workers(self, should_stop: Any) -> None:
        """Until a rollout worker is up; the pool gives up by itself when none starts in time, again and again.

        All that are up are asked first: one that ended meanwhile would keep the others waiting for it.
        """
        self._rollout.poll()
        while not (tickets := [self._rollout.ticket(number) for number in self._rollout.up()]):
            if should_stop():
                raise StopRequestedError("waiting for rollout workers")
            time.sleep(IDLE_S)
            self._rollout.poll()
        pings = {ticket: self._rollout.submit(ticket.number, "ping") for ticket in tickets}
        answers = settle(pings, timeout_s=self._config.cluster.worker_timeout_s)
        for ticket in tickets:
            if ticket not in answers:
                self._rollout.lose_if_current(ticket, "it did not answer before a weight sync: it hangs")
            elif answers[ticket].trouble is not None:
                self._rollout.lose_if_current(ticket, answers[ticket].reason)
        if not self._rollout.up():
            self._wait_for_workers(should_stop)

    def _lose_newcomers(self, tickets: tuple[Ticket, ...]) -> None:
        """After an attempt of `tickets` that failed: where none of them was lost, those that have never served are the
        likeliest cause, such as a node that the learners cannot reach; the others go on without them."""
        if tuple(map(self._rollout.ticket, self._rollout.up())) != tickets:
            return
        newcomers = [ticket for ticket in tickets if ticket.number in self._rollout.newcomers()]
        if len(newcomers) < len(tickets):
            for ticket in newcomers:
                self._rollout.lose_if_current(ticket, f"a weight sync failed when it took part: {self._problem}")

    def _connect(self, tickets: tuple[Ticket, ...]) -> bool:
        """Make the transfer group of rank 0 of the learners and the given processes; false if one was lost."""
        learner, cluster = self._learner, self._config.cluster
        identity: Identity = gather(
            {learner.name(0): learner.identities()[learner.name(0)]}, phase="identity", timeout_s=cluster.step_timeout_s
        )[0]
        make_sender = partial(
            weight_sender,
            self._config.weight_transfer,
            world_size_of_rollout=len(tickets) * self._config.rollout.tensor_parallel_size,
            host=identity.node_ip,
            timeout_s=cluster.worker_timeout_s,
        )
        init_info = learner.call_all("prepare_sender", make_sender, timeout_s=cluster.step_timeout_s)[0]
        joins = {
            ticket: self._rollout.submit(ticket.number, "join_transfer", init_info, place=place)
            for place, ticket in enumerate(tickets)
        }
        is_whole = self._settle(joins, learner.submit_all("connect_sender")) is not None
        self._members = tickets if is_whole else ()
        return is_whole

    def _send(self, version: int) -> int | None:
        """One set of weights; their bytes, or None if a rollout worker was lost meanwhile."""
        learner, timeout_s = self._learner, self._config.cluster.step_timeout_s
        update_info = learner.call_all("weight_update_info", timeout_s=timeout_s)[0]
        updates = {
            ticket: self._rollout.submit(ticket.number, "update_weights", update_info, policy_version=version)
            for ticket in self._members
        }
        sent = self._settle(updates, learner.submit_all("publish"))
        learner.call_all("release_weights", timeout_s=timeout_s)
        return None if sent is None else sent[learner.name(0)].value

    def _settle(self, rollout: Mapping[Ticket, Any], learner: Mapping[str, Any]) -> dict[str, Outcome] | None:
        """What the learners' calls gave; None if the attempt failed, after which rollout workers that are lost are
        replaced, and the others are to get whole weights.

        Raises:
            WorkersLostError: learners are lost.
        """
        pending: dict[Any, Any] = {**rollout, **learner}
        outcomes: dict[Any, Outcome] = {}
        deadline = time.monotonic() + self._config.cluster.step_timeout_s
        has_failed = False
        while pending and time.monotonic() < deadline:
            outcomes |= take_finished(pending)
            # Without a learner there is nothing to settle: the rollout workers wait for it.
            raise_trouble(
                {who: o for who, o in outcomes.items() if who in learner and o.trouble is Trouble.DIED}, PHASE
            )
            if not has_failed and any(outcome.trouble for outcome in outcomes.values()):
                has_failed, deadline = True, min(deadline, time.monotonic() + self._patience_s)
        lost = {ticket: "it did not answer during a weight sync: it hangs" for ticket in rollout if ticket in pending}
        lost |= {t: o.reason for t in rollout if (o := outcomes.get(t)) is not None and o.trouble is Trouble.DIED}
        for ticket, reason in lost.items():
            self._rollout.lose_if_current(ticket, reason)
        outcomes |= self._wait_for_learners({who: call for who, call in pending.items() if who in learner})
        failed = {str(who): outcome for who, outcome in outcomes.items() if outcome.trouble is not None}
        if not lost and not failed:
            return {who: outcomes[who] for who in learner}
        final = (Trouble.DIED, Trouble.MISTAKE)
        raise_trouble({who: outcomes[who] for who in learner if outcomes[who].trouble in final}, PHASE)
        self._problem = "; ".join([*(o.reason for o in failed.values()), *lost.values()])
        for ticket in rollout:
            if ticket not in lost:
                self._rollout.outdated(ticket.number)
        return None

    def _wait_for_learners(self, pending: dict[str, Any]) -> dict[str, Outcome]:
        """The rest of the learners' answers: a sender that waited for a worker that hung is free now."""
        outcomes = settle(pending, timeout_s=SETTLE_S)
        if silent := sorted(set(pending) - set(outcomes)):
            raise WorkersLostError(f"{PHASE}: no answer from {', '.join(silent)}", silent)
        return outcomes
