"""Rollouts with given texts, for tests of rewards."""

import numpy as np
import pytest

from raylhf.batch import Prompt, Rollouts


def make_rollouts(*texts, truncated=(), empty=()):
    """One response a prompt; rows in `truncated` ran into the length limit, rows in `empty` have no tokens."""
    lengths = [0 if i in empty else len(text) + 1 for i, text in enumerate(texts)]
    return Rollouts(
        prompts=[
            Prompt(index=10 + i, messages=({"role": "user", "content": f"question {i}"},), metadata={"row": i})
            for i in range(len(texts))
        ],
        prompt_ids=[np.arange(4)] * len(texts),
        response_ids=[np.arange(length) for length in lengths],
        rollout_logprobs=[np.full(length, -1.0, dtype=np.float32) for length in lengths],
        response_texts=list(texts),
        finish_reasons=["length" if i in truncated else "stop" for i in range(len(texts))],
        policy_versions=np.zeros(len(texts), dtype=np.int64),
        temperature=1.0,
    )


@pytest.fixture
def rollouts_of():
    """`rollouts_of("text", ..., truncated=rows, empty=rows)`: Rollouts with these response texts."""
    return make_rollouts
