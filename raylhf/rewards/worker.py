"""The reward worker: the whole reward graph, then what every score goes through."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.config.reward import RewardPlaneConfig
from raylhf.rewards.build import BuildContext, build_reward, can_be_dense
from raylhf.rewards.fusion import laid_out
from raylhf.rewards.selection import scattered
from raylhf.rewards.state import RewardState
from raylhf.rewards.validity import NAMED_PROMPT, NUM_TOLD_ERRORS, unscored, usable

if TYPE_CHECKING:  # interfaces imports torch, which a reward worker need not load
    from raylhf.interfaces import Reward

FORWARDS_PER_BATCH = 8
"""A batch of requests holds up to this many budgets of one forward pass; leaves sort by length before they cut."""


@dataclass
class _Request:
    rollouts: Rollouts
    answer: "asyncio.Future[tuple[RewardOutput, dict[str, Any]]]"

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rollouts.prompt_ids)) + int(self.rollouts.response_lengths.sum())


class RewardWorker:
    """Scores rollouts: the graph's score, minus the missing-EOS penalty, then clipped, in this order.

    The clip comes last so that it bounds what the learner sees, penalty included. Requests that wait while others are
    scored are scored together; a request keeps its rows together, and so its groups.
    """

    def __init__(self, config: RewardPlaneConfig, policy: str | None = None):
        """`policy` is the folder of the policy's tokenizer; without it there are no dense scores."""
        self._config = config
        self._policy = policy
        self._state = RewardState()
        self._waiting: deque[_Request] = deque()
        self._serving: asyncio.Task[None] | None = None
        self._reward: Reward

    def start(self) -> None:
        """Build the reward graph. A ValueError says what cannot be built."""
        config = self._config
        context = BuildContext(
            policy=self._policy,
            device="cuda" if config.num_gpus > 0 else "cpu",
            batch_tokens=config.batch_tokens,
            state=self._state,
        )
        self._reward = build_reward(config.graph, context)
        if "torch" in sys.modules:  # rules load no torch, and need none
            sys.modules["torch"].set_num_threads(config.threads)

    async def score(self, rollouts: Rollouts) -> tuple[RewardOutput, dict[str, Any]]:
        """The scores, and a small summary that the driver may read.

        The summary has, by response, `scores` (NaN where invalid), `valid`, `resample` and `parts` (lists by name); the
        first `errors`; `seconds`, the request's share of its batch; and `sources`, the calls of the graph's leaves that
        no summary has told yet. What the graph raises reaches every request of the batch.
        """
        request = _Request(rollouts, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await request.answer

    def score_now(self, rollouts: Rollouts) -> RewardOutput:
        """The scores, at once and alone. Responses without tokens are invalid and do not reach the graph.

        The columns of a `vector` are among the parts; they are not passed on beside them, because a call that failed
        has none, and outputs must join.
        """
        rows = np.flatnonzero(rollouts.response_lengths).tolist()
        if len(rows) == len(rollouts) > 0:
            output = self._reward.score(rollouts)
        elif rows:
            output = scattered(self._reward.score(rollouts.select(rows)), rows, rollouts)
        else:
            output = unscored(len(rollouts))
        if num_empty := len(rollouts) - len(rows):
            sentence = f"{num_empty} of {len(rollouts)} responses have no tokens and are not scored"
            output = replace(output, errors=(sentence, *output.errors))
        penalised = output.scores - self._config.missing_eos_penalty * rollouts.is_truncated
        output = usable("reward", replace(output, scores=penalised))
        scores = output.scores
        if self._config.clip is not None:
            scores = np.clip(scores, -self._config.clip, self._config.clip)
        token_scores = self._token_scores(output, scores, rollouts)
        return replace(output, scores=scores, token_scores=token_scores, vector=None, vector_names=())

    def set_observing(self, observing: bool) -> None:
        """Whether valid scores are collected for the graph's running moments."""
        self._state.observing = observing

    def take_pending(self) -> dict[str, list[float]]:
        """What was collected since the last call (see `state.merge_pending`)."""
        return self._state.take_pending()

    def ping(self) -> None:
        """Answer, also while a batch is scored."""

    def commit(self, merged: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
        """Fold in what all workers collected; every worker is given the same, and returns the same new state."""
        self._state.commit(merged)
        return self.state_dict()

    def needs_commit(self) -> bool:
        """Whether a node of the graph has no moments yet."""
        return self._state.needs_commit

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What later scores depend on, as plain JSON; equal on all workers."""
        return self._state.state_dict()

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a `state_dict`."""
        self._state.load_state_dict(saved)

    def close(self) -> None:
        """Answer nobody any more; whoever waits is told."""
        _tell(self._waiting, RuntimeError("the reward worker was closed before it scored the request"))
        self._waiting.clear()

    async def _serve(self) -> None:
        """Score what waits, batch after batch, until nothing does. However it ends, nobody waits for ever."""
        try:
            while batch := self._take_batch():
                await self._serve_batch(batch)
        finally:
            self.close()

    async def _serve_batch(self, batch: Sequence[_Request]) -> None:
        started = time.perf_counter()
        try:
            together = Rollouts.concatenate([request.rollouts for request in batch])
            output = await asyncio.to_thread(self._score_in_thread, together)
            self._answer(batch, output, time.perf_counter() - started)
        except Exception as error:  # it belongs to those who asked; the worker serves on
            _tell(batch, error)
        finally:  # those who are left: the serving was cancelled
            _tell(batch, RuntimeError("the reward worker was stopped before it answered the request"))

    def _score_in_thread(self, rollouts: Rollouts) -> RewardOutput:
        """`score_now`; what would end the process (sys.exit, a Rust panic) reaches those who asked instead."""
        try:
            return self.score_now(rollouts)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"the reward ended with {type(error).__name__}: {error}") from error

    def _take_batch(self) -> list[_Request]:
        """The requests to score next: of one temperature and within the token budget, but at least one if any waits."""
        budget = FORWARDS_PER_BATCH * self._config.batch_tokens
        batch: list[_Request] = []
        while self._waiting:
            request = self._waiting[0]
            if batch and request.num_tokens > budget:
                break
            if batch and request.rollouts.temperature != batch[0].rollouts.temperature:
                break
            self._waiting.popleft()
            if not request.answer.cancelled():
                batch.append(request)
                budget -= request.num_tokens
        return batch

    def _answer(self, batch: Sequence[_Request], output: RewardOutput, seconds: float) -> None:
        """Give each request its rows; the calls of the leaves go with the first."""
        calls = [asdict(call) for call in self._state.take_calls()]
        start, num_responses = 0, max(len(output.scores), 1)
        for request in batch:
            rows = slice(start, start := start + len(request.rollouts))
            part = rows_of(output, rows, request.rollouts)
            share = seconds * len(request.rollouts) / num_responses
            if not request.answer.done():
                request.answer.set_result((part, {**summary_of(part), "seconds": share, "sources": calls}))
                calls = []

    def _token_scores(
        self, output: RewardOutput, scores: np.ndarray, rollouts: Rollouts
    ) -> Sequence[np.ndarray] | None:
        """The dense scores laid out to the final scores; never None for a graph with dense leaves, so batches join."""
        if output.token_scores is not None:
            return laid_out(output.token_scores, scores)
        if self._policy is None or not can_be_dense(self._config.graph):
            return None
        return laid_out([np.zeros(length, dtype=np.float32) for length in rollouts.response_lengths], scores)


def _tell(requests: Iterable[_Request], error: Exception) -> None:
    """Answer with `error` where there is no answer yet."""
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(error)


def rows_of(output: RewardOutput, rows: slice, rollouts: Rollouts) -> RewardOutput:
    """The given rows of `output`, which are the scores of `rollouts`, with the sentences about them.

    A sentence about a prompt goes to the prompt's requests, another one to all requests with an invalid response. Where
    that leaves none for an invalid response, it is told all of them.
    """
    valid = output.valid[rows]
    indices = {prompt.index for prompt in rollouts.prompts}
    errors = [
        error for error in output.errors if (named := NAMED_PROMPT.search(error)) is None or int(named[1]) in indices
    ]
    return RewardOutput(
        scores=output.scores[rows],
        valid=valid,
        parts={name: scores[rows] for name, scores in output.parts.items()},
        token_scores=None if output.token_scores is None else output.token_scores[rows],
        resample=None if output.resample is None else output.resample[rows],
        errors=() if valid.all() else tuple(errors) or output.errors,
    )


def summary_of(output: RewardOutput) -> dict[str, Any]:
    """The small numbers of `output` as lists."""
    resample = np.zeros(len(output.scores), dtype=bool) if output.resample is None else output.resample
    return {
        "scores": output.scores.tolist(),
        "valid": output.valid.tolist(),
        "resample": resample.tolist(),
        "parts": {name: values.tolist() for name, values in output.parts.items()},
        "errors": output.errors[:NUM_TOLD_ERRORS],
    }
