"""Sampling and scoring: prompts stream through rollout and reward workers without a barrier between them, and through
others where workers are lost meanwhile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylhf.batch import Prompt
from raylhf.cluster.actors import (
    POLL_S,
    ActorGroup,
    Outcome,
    StopRequestedError,
    Trouble,
    WorkerError,
    raise_trouble,
    take_finished,
)
from raylhf.cluster.pool import Ticket
from raylhf.driver.workers import Workers

PHASE = "rollout and reward"
IDLE_S = 0.1
FETCH_ROUNDS = 3
WAVES = 2
"""Prompts that a rollout worker has at once, in multiples of what its engine decodes together: the next ones wait there
while these are decoded. The others wait in the driver, for whoever is free first."""
STAGES = ("waiting", "sampling", "scoring", "scored")
"""Of a prompt on its way."""


@dataclass(frozen=True)
class ScoredGroup:
    """The responses of one prompt: references to the data, and small numbers about them."""

    rollouts: Any
    """Reference to Rollouts."""
    rewards: Any
    """Reference to RewardOutput."""
    rollout_summary: dict[str, Any]
    reward_summary: dict[str, Any]
    num_resamples: int = 0
    """How often the group was sampled anew because a score failed."""


@dataclass
class _Task:
    """One place of the batch on its way."""

    prompt: Prompt
    attempt: int = 0
    """How often it was sampled anew because a score failed."""
    sampler: Ticket | None = None
    """The rollout worker that has it, or had it."""
    sampled: Outcome | None = None
    """How the rollout call ended, when it has."""
    scorer: Ticket | None = None
    rollouts: Any = None
    rollout_summary: Any = None
    rewards: Any = None
    reward_summary: Any = None
    earlier: dict[str, Any] | None = None
    """Reward summary of an earlier attempt."""
    done: ScoredGroup | None = None

    @property
    def stage(self) -> str:
        """One of STAGES."""
        return STAGES[3 if self.done else 2 if self.sampled else 1 if self.sampler else 0]

    def forget_sample(self) -> None:
        """It is to be sampled (again), and scored."""
        self.sampler = self.rollouts = self.rollout_summary = self.sampled = None
        self.forget_scores()

    def forget_scores(self) -> None:
        """It is to be scored (again)."""
        self.scorer = self.rewards = self.reward_summary = self.done = None


class Collection:
    """A batch of prompts, sampled and scored, whatever happens to the workers meanwhile.

    A group goes to its reward worker the moment it is sampled: the reward call waits for the rollout's reference in
    Ray, not for the batch. Seeds depend on the prompt and its place in the batch, not on the workers, so that what is
    sampled again, by another worker, is the same. A group of which a leaf with `on_failure: resample` failed is sampled
    anew under another seed, `reward.max_resamples` times at most.
    """

    def __init__(
        self,
        workers: Workers,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        seed_key: Sequence[int],
        should_stop: Callable[[], bool],
        num_samples: int = 0,
        on_reissue: Callable[[int, str, str], None] = lambda place, worker, reason: None,
    ) -> None:
        """The first `num_samples` groups come with a row for people to read.

        `on_reissue(place, worker, reason)` is told of each prompt that is given to another rollout worker.
        """
        self._config = workers.config
        self.workers = workers
        self._num_responses = num_responses
        self._seed_key = tuple(seed_key)
        self._should_stop = should_stop
        self._num_samples = num_samples
        self._on_reissue = on_reissue
        self._tasks = [_Task(prompt) for prompt in prompts]
        self._capacity = max(1, WAVES * self._config.rollout.max_num_seqs // num_responses)
        self._must_score_again = False
        """A reward worker is lost with what it had observed of this batch."""
        self.may_score = True
        """Whether responses are scored as they come; until then, they are only sampled."""

    @property
    def is_done(self) -> bool:
        """Whether every place is sampled and scored."""
        return all(task.done is not None for task in self._tasks)

    @property
    def stages(self) -> list[str]:
        """Where each place stands."""
        return [task.stage for task in self._tasks]

    def run(self, lost: Sequence[int] = (), *, ahead: Sequence["Collection"] = ()) -> list[ScoredGroup]:
        """The groups in the prompts' order. A later call samples those again whose places are `lost`.

        Those of `ahead` come on meanwhile, as far as workers have room for more.
        """
        for place in lost:
            self._reissue(place, "its responses were lost")
        # What the whole batch was observed to be goes with the part that is scored anew.
        self._must_score_again |= bool(lost) and self.workers.statistics.is_observing
        while True:
            self._finish_tasks(ahead)
            if not self.workers.statistics.is_observing:
                break
            if not self._must_score_again and self.workers.statistics.take():
                break
            # Every score is to be observed once: what was observed goes, and all is scored again, to the same scores.
            self._must_score_again = False
            self.workers.statistics.drop()
            for task in self._tasks:
                task.forget_scores()
        return [task.done for task in self._tasks if task.done is not None]

    def _finish_tasks(self, ahead: Sequence["Collection"]) -> None:
        """Until every place is done.

        Who has not answered within cluster.step_timeout_s hangs, and is replaced, once.

        Raises:
            WorkerError: a worker failed, or not all was done in twice that time.
        """
        timeout_s = self._config.cluster.step_timeout_s
        deadline, has_replaced = time.monotonic() + timeout_s, False
        while not self.is_done:
            if self._should_stop():
                raise StopRequestedError(PHASE)
            self._must_score_again |= self.workers.tend()
            if not advance([self, *ahead]):  # nobody serves yet
                time.sleep(IDLE_S)
            if time.monotonic() > deadline:
                open_tasks = [task for task in self._tasks if task.done is None]
                waited_for = ", ".join(sorted({self._describe_silent(task) for task in open_tasks}))
                if not has_replaced:
                    self._replace_silent(open_tasks)
                    deadline, has_replaced = time.monotonic() + timeout_s, True
                    continue
                raise WorkerError(f"{PHASE}: no answer from {waited_for} within {timeout_s:g} s")

    # --- one round (see `advance`) ----------------------------------------------------------------------------------

    def note_sampled(self) -> None:
        """A worker whose responses wait for their scores is free for other prompts."""
        open_calls = {
            place: task.rollout_summary
            for place, task in enumerate(self._tasks)
            if task.sampled is None and task.rollout_summary is not None
        }
        for place, outcome in take_finished(open_calls, wait_s=0).items():
            self._tasks[place].sampled = outcome
            self._take_sample(place)

    def add_loads(self, loads: dict[Ticket, int]) -> None:
        """Count the prompts that each of the given rollout workers has."""
        for task in self._tasks:
            if task.sampled is None and task.sampler in loads:
                loads[task.sampler] += 1

    def hand_out(self, loads: dict[Ticket, int], scorers: Sequence[int]) -> None:
        """Give prompts to the rollout workers that have fewest, and their responses to reward workers."""
        reward = self.workers.reward
        for place, task in enumerate(self._tasks):
            if task.done is not None or task.reward_summary is not None:
                continue
            if task.rollouts is None:
                least = min(loads, key=lambda ticket: loads[ticket], default=None)
                if least is None or loads[least] >= self._capacity:
                    continue
                self._sample(place, task, least)
                loads[least] += 1
            if self.may_score:
                task.scorer = reward.ticket(scorers[place % len(scorers)])
                task.rewards, task.reward_summary = reward.submit(
                    task.scorer.number, "score", task.rollouts, num_returns=2
                )

    def open_calls(self) -> dict[int, Any]:
        """References of the reward calls that are waited for, by place."""
        return {
            place: task.reward_summary
            for place, task in enumerate(self._tasks)
            if task.done is None and task.reward_summary is not None
        }

    def _sample(self, place: int, task: _Task, ticket: Ticket) -> None:
        key = (*self._seed_key, place, task.prompt.index, *([task.attempt] if task.attempt else []))
        task.sampler = ticket
        task.rollouts, task.rollout_summary = self.workers.rollout.submit(
            ticket.number,
            "generate",
            task.prompt,
            num_responses=self._num_responses,
            seed=response_seed(self._config.seed, *key),
            with_sample=place < self._num_samples,
            num_returns=2,
        )

    def _take_sample(self, place: int) -> bool:
        """Whether the place's rollout call gave responses; it is given to others where its worker is lost."""
        task = self._tasks[place]
        assert task.sampler is not None and task.sampled is not None
        if task.sampled.trouble is Trouble.DIED:
            self.workers.rollout.lose_if_current(task.sampler, task.sampled.reason)
            self._reissue(place, "the worker was lost")
        elif task.sampled.trouble is Trouble.LOST_DATA:
            self._reissue(place, task.sampled.reason)
        else:
            raise_trouble({self._describe(task): task.sampled}, PHASE)
            return True
        return False

    def take_in(self, place: int, scored: Outcome) -> None:
        """A reward call has ended: well, because its worker is lost, or because of what it waited for."""
        task = self._tasks[place]
        assert task.scorer is not None
        if task.sampled is None:
            task.sampled = take_finished({place: task.rollout_summary}, wait_s=0).get(place)
            if task.sampled is not None and not self._take_sample(place):
                return
        if scored.trouble is Trouble.DIED:
            self._must_score_again |= self.workers.statistics.is_observing
            self.workers.reward.lose_if_current(task.scorer, scored.reason)
            task.forget_scores()
        elif scored.trouble is Trouble.LOST_DATA:
            self._reissue(place, "its responses were lost")
        else:
            raise_trouble(
                {f"{self.workers.reward.name(task.scorer.number)} (prompt {task.prompt.index})": scored}, PHASE
            )
            assert task.sampled is not None, "a score of responses that are not there"
            self._accept(task, task.sampled.value, scored.value)

    def _reissue(self, place: int, reason: str) -> None:
        """Have a place sampled again, from the start."""
        task = self._tasks[place]
        assert task.sampler is not None
        self._on_reissue(place, self.workers.rollout.name(task.sampler.number), reason)
        task.forget_sample()

    def _accept(self, task: _Task, rollout_summary: dict[str, Any], reward_summary: dict[str, Any]) -> None:
        """The group is scored; it is sampled anew if one of its scores failed and asks for that."""
        if task.earlier is not None:
            reward_summary = _with_calls_of(task.earlier, reward_summary)
        if any(reward_summary["resample"]) and task.attempt < self._config.reward.max_resamples:
            task.attempt += 1
            task.earlier = reward_summary
            task.forget_sample()
            return
        task.done = ScoredGroup(task.rollouts, task.rewards, rollout_summary, reward_summary, task.attempt)

    def _replace_silent(self, tasks: Sequence[_Task]) -> None:
        """End the workers that the tasks wait for; what becomes of their calls is taken in as after any death."""
        for task in tasks:
            reason = f"it hangs: no answer for prompt {task.prompt.index} in {PHASE}"
            if task.sampled is not None and task.scorer is not None:
                self.workers.reward.lose_if_current(task.scorer, reason)
            elif task.sampler is not None:
                self.workers.rollout.lose_if_current(task.sampler, reason)

    def _describe(self, task: _Task) -> str:
        """The rollout worker that a place was given to."""
        who = "no rollout worker" if task.sampler is None else self.workers.rollout.name(task.sampler.number)
        return f"{who} (prompt {task.prompt.index})"

    def _describe_silent(self, task: _Task) -> str:
        """The worker that a place waits for."""
        if task.sampled is None or task.scorer is None:
            return self._describe(task)
        return f"{self.workers.reward.name(task.scorer.number)} (prompt {task.prompt.index})"


def advance(collections: Sequence[Collection], *, wait_s: float = POLL_S) -> bool:
    """One round over batches: give out prompts and responses, those of the first batch first, and take in scores.

    Waits for the first score for up to `wait_s`. False where there is nothing to wait for.
    """
    if not collections:
        return False
    workers = collections[0].workers
    for collection in collections:
        collection.note_sampled()
    if scorers := workers.reward.serving():
        loads = {workers.rollout.ticket(number): 0 for number in workers.rollout.serving()}
        for collection in collections:
            collection.add_loads(loads)
        for collection in collections:
            collection.hand_out(loads, scorers)
    open_calls = {
        (number, place): call
        for number, collection in enumerate(collections)
        for place, call in collection.open_calls().items()
    }
    for (number, place), outcome in take_finished(dict(open_calls), wait_s=wait_s, all_together=False).items():
        collections[number].take_in(place, outcome)
    return bool(open_calls)


def _with_calls_of(earlier: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` with the time and the leaves' calls of an earlier attempt, whose failures count too."""
    return {
        **summary,
        "seconds": earlier["seconds"] + summary["seconds"],
        "sources": [*earlier["sources"], *summary["sources"]],
    }


def hand_over(
    collection: Collection,
    learners: ActorGroup,
    references: Callable[[Sequence[ScoredGroup]], list[list[list[Any]]]],
    *,
    timeout_s: float,
    ahead: Sequence[Collection] = (),
) -> list[ScoredGroup]:
    """Collect, and have every rank fetch its lists of `references(groups)`, for a call with `Held()`.

    What is lost on the way, with the machine that it was on, is sampled again. Batches `ahead` come on meanwhile.
    """
    groups, places = collection.run(ahead=ahead), []
    for _ in range(FETCH_ROUNDS):
        lists = references(groups)
        lost = learners.hold(lists, timeout_s=timeout_s)
        missing = [
            own[place]
            for lists_of_rank, places in zip(lists, lost, strict=True)
            for own in lists_of_rank
            for place in places
        ]
        if not missing:
            return groups
        places = [i for i, group in enumerate(groups) if group.rollouts in missing or group.rewards in missing]
        groups = collection.run(lost=places, ahead=ahead)
    raise WorkerError(
        f"learners could not fetch {len(places)} of {len(groups)} groups of responses, {FETCH_ROUNDS} times in a row: "
        "see whether their nodes reach those of the rollout workers, and whether cluster.object_store_gib holds a batch"
    )


def response_seed(*key: int) -> int:
    """A seed of 31 bits that any change of the key scatters; a group uses it and the numbers after it."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)


def share_among_ranks(groups: Sequence[ScoredGroup], num_ranks: int) -> list[list[ScoredGroup]]:
    """Whole groups to ranks: equally many on each, tokens balanced (longest first, back and forth)."""
    by_length = sorted(groups, key=lambda group: -group.rollout_summary["num_tokens"])
    shares: list[list[ScoredGroup]] = [[] for _ in range(num_ranks)]
    for i, group in enumerate(by_length):
        lap, place = divmod(i, num_ranks)
        shares[place if lap % 2 == 0 else num_ranks - 1 - place].append(group)
    return shares


def sample_rows(groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """Prompt, response and score of the first response, of the groups that were asked for it."""
    return [
        {**group.rollout_summary["sample"], "score": group.reward_summary["scores"][0]}
        for group in groups
        if "sample" in group.rollout_summary
    ]
