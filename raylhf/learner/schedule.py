"""When rows are learnt from, and at what rate."""

from collections.abc import Sequence

import numpy as np

from raylhf.config.learner import LearnerConfig


def lr_scale(learner: LearnerConfig, *, steps_taken: int, share_done: float) -> float:
    """What the learning rate is multiplied by after so many optimizer steps and such a share of the run."""
    return min(1.0, (steps_taken + 1) / max(learner.lr_warmup_steps, 1)) * lr_decay(learner, share_done)


def lr_decay(learner: LearnerConfig, share_done: float) -> float:
    """The same without warm-up."""
    return 1 - share_done if learner.lr_schedule == "linear" else 1.0


def shuffled_minibatches(num: int, num_minibatches: int, *, seed: Sequence[int]) -> list[list[int]]:
    """0 to `num` - 1 in an order drawn by `seed`, cut into minibatches."""
    order = np.random.default_rng(seed).permutation(num)
    return [part.tolist() for part in np.array_split(order, num_minibatches)]
