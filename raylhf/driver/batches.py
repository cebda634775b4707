"""The batches of prompts on their way: that of the step under way and, in asynchronous mode, those after it."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raylhf.batch import Prompt
from raylhf.cluster.actors import WorkerError
from raylhf.driver.collect import Collection, advance
from raylhf.driver.ledger import Ledger
from raylhf.driver.workers import Workers
from raylhf.text.prompts import PromptOrder

TRAIN_SEED = 0
"""Begins the key of every seed in training."""


@dataclass
class Batch:
    """The prompts of one step, which are sampled and scored."""

    step: int
    """Steps done before the one that learns from it."""
    first: int
    """Number of its first draw."""
    position: dict[str, int]
    """Where the order of the prompts stood before they were drawn."""
    epochs: float
    """Epochs drawn with them."""
    prompts: Sequence[Prompt]
    collection: Collection
    opened_at: float
    finished_at: float | None = None
    """When all was sampled and scored, as far as that was noticed."""


class BatchQueue:
    """Draws prompts, batch by batch, and keeps up to `1 + rollout.max_staleness` batches on their way.

    The batch of step s (counted from 0) is given out when the weights have version s - max_staleness or a later one,
    so that no token of it is sampled by older ones: of the draws that were ever made, no more than
    (max_staleness + version + 1) * prompts_per_step are in flight or done. Batches are learnt from in the order in
    which they were drawn, whichever is complete first: short responses do not come before long ones. With
    max_staleness 0 there is one batch at a time.
    """

    def __init__(self, workers: Workers, order: PromptOrder, ledger: Ledger, should_stop: Callable[[], bool]) -> None:
        self._config = workers.config
        self._workers = workers
        self._order = order
        self._ledger = ledger
        self._should_stop = should_stop
        self._batches: deque[Batch] = deque()
        self._finished_at = 0.0
        """When the batch before the first was complete."""
        self._closed_at = 0.0
        """When it was learnt from."""
        self._problem: Exception | None = None
        """What went wrong while nobody waited for a batch."""

    def position(self) -> dict[str, int]:
        """Where the order stood before the first prompt that is not learnt from yet: what a checkpoint needs."""
        return self._batches[0].position if self._batches else self._order.state()

    def clear(self) -> None:
        """Give up what is on its way; its prompts are to be drawn again."""
        self._batches.clear()
        self._problem = None

    def open(self, step: int) -> Batch:
        """The batch of the step under way, with those after it that may be given out by now."""
        last = min(step + self._config.rollout.max_staleness, self._config.num_steps - 1)
        next_step = self._batches[-1].step + 1 if self._batches else step
        for later in range(next_step, max(last, step) + 1):
            self._draw(later)
        head = self._batches[0]
        assert head.step == step, f"batch {head.step} in step {step}"
        head.collection.may_score = True
        return head

    def ahead(self) -> list[Collection]:
        """The batches after the first."""
        return [batch.collection for batch in list(self._batches)[1:]]

    def stages(self) -> Counter[str]:
        """How many prompts stand in each of `collect.STAGES`; those being learnt from are scored."""
        return Counter(stage for batch in list(self._batches) for stage in batch.collection.stages)

    def advance(self) -> None:
        """One round over the batches after the first, without waiting, while the learners learn from that one."""
        if self._problem is not None or len(self._batches) < 2:
            return
        try:
            self._workers.tend(may_publish=False)
            advance(self.ahead(), wait_s=0)
        except (WorkerError, ValueError, OSError) as error:  # told of when the step under way is done
            self._problem = error
        self.note_finished()

    def raise_problem(self) -> None:
        """Raise what `advance` met."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def note_finished(self) -> None:
        """Take down which batches are complete by now."""
        now = time.monotonic()
        for batch in self._batches:
            if batch.finished_at is None and batch.collection.is_done:
                batch.finished_at = now

    def seconds(self, batch: Batch) -> float:
        """What rollout and reward workers took for the first batch alone: from when they were done with the last.

        0 where both were found complete at once.
        """
        assert batch.finished_at is not None, f"batch {batch.step} is not complete"
        return batch.finished_at - max(batch.opened_at, self._finished_at)

    def cycle_seconds(self, batch: Batch) -> float:
        """In which rollout and reward workers gave one batch: where they go on while the learners learn, from one batch
        to the next as the learners get them (the first counts from its start)."""
        if self._config.rollout.max_staleness == 0:
            return self.seconds(batch)
        return time.monotonic() - (self._closed_at or batch.opened_at)

    def close(self, batch: Batch) -> None:
        """The first batch is learnt from."""
        assert batch is self._batches[0] and batch.finished_at is not None
        self._finished_at, self._closed_at = batch.finished_at, time.monotonic()
        self._batches.popleft()

    def _draw(self, step: int) -> None:
        config = self._config
        position, first = self._order.state(), self._order.num_drawn
        prompts = self._order.draw(config.rollout.prompts_per_step)
        self._ledger.issue(step + 1, {first + place: prompt.index for place, prompt in enumerate(prompts)})

        def note_reissue(place: int, worker: str, reason: str) -> None:
            self._ledger.reissue([first + place], worker, reason)

        collection = Collection(
            self._workers,
            prompts,
            num_responses=config.rollout.group_size,
            num_samples=config.tracking.samples_per_step,
            seed_key=(TRAIN_SEED, step),
            should_stop=self._should_stop,
            on_reissue=note_reissue,
        )
        # What is observed belongs to a step: a reward that keeps statistics scores a batch in that batch's own step.
        collection.may_score = not config.reward.has_state
        now = time.monotonic()
        self._batches.append(Batch(step, first, position, self._order.epochs_done, prompts, collection, opened_at=now))
