"""Rollouts with given texts and rewards with given scores, for tests of rewards."""

import numpy as np
import pytest

from raylhf.batch import Prompt, RewardOutput, Rollouts


def make_rollouts(*texts, truncated=(), empty=(), questions=None, metadata=None):
    """One response a prompt; rows in `truncated` ran into the length limit, rows in `empty` have no tokens.

    Prompt i has index 10 + i, the text `question i` (or that of `questions`) and the metadata `row: i` besides its own.
    """
    lengths = [0 if i in empty else len(text) + 1 for i, text in enumerate(texts)]
    questions = questions or [f"question {i}" for i in range(len(texts))]
    metadata = metadata or [{} for _ in texts]
    return Rollouts(
        prompts=[
            Prompt(
                index=10 + i,
                messages=({"role": "user", "content": questions[i]},),
                metadata={"row": i, **metadata[i]},
            )
            for i in range(len(texts))
        ],
        prompt_ids=[np.arange(4)] * len(texts),
        response_ids=[np.arange(length) for length in lengths],
        rollout_logprobs=[np.full(length, -1.0, dtype=np.float32) for length in lengths],
        response_texts=list(texts),
        finish_reasons=["length" if i in truncated else "stop" for i in range(len(texts))],
        policy_versions=[np.zeros(length, dtype=np.int64) for length in lengths],
        temperature=1.0,
    )


class GivenReward:
    """Returns what it was made with, of the rows that it is asked for, and remembers which these were."""

    def __init__(
        self,
        *scores,
        valid=None,
        token_scores=None,
        vector=None,
        vector_names=(),
        resample=None,
        errors=(),
        calibration=None,
    ):
        self.calibration = calibration
        self.asked: list[list[int]] = []
        self._scores = np.array(scores, dtype=float)
        self._valid = np.isfinite(self._scores) if valid is None else np.array(valid)
        self._token_scores = token_scores
        self._vector = None if vector is None else np.array(vector, dtype=float)
        self._vector_names = vector_names
        self._resample = None if resample is None else np.array(resample)
        self._errors = errors

    def score(self, rollouts):
        rows = [prompt.metadata["row"] for prompt in rollouts.prompts]
        self.asked.append(rows)
        dense = self._token_scores
        return RewardOutput(
            scores=self._scores[rows],
            valid=self._valid[rows],
            token_scores=None if dense is None else [np.array(dense[i], dtype=np.float32) for i in rows],
            vector=None if self._vector is None else self._vector[rows],
            vector_names=self._vector_names,
            resample=None if self._resample is None else self._resample[rows],
            errors=self._errors,
        )


@pytest.fixture
def rollouts_of():
    """`rollouts_of("text", ..., truncated=rows, empty=rows)`: Rollouts with these response texts."""
    return make_rollouts


@pytest.fixture
def given():
    """`given(1.0, 2.0, ...)`: a reward with these scores, row by row."""
    return GivenReward
