"""The reward worker: the whole reward graph, then what every score goes through."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.config.reward import RewardPlaneConfig
from raylhf.rewards.build import build_reward
from raylhf.rewards.validity import checked

if TYPE_CHECKING:  # interfaces imports torch, which a reward worker need not load
    from raylhf.interfaces import Reward

NUM_REPORTED_ERRORS = 3


class RewardWorker:
    """Scores rollouts: the graph's score, minus the missing-EOS penalty, then clipped, in this order.

    The clip comes last so that it bounds what the learner sees, penalty included.
    """

    def __init__(self, config: RewardPlaneConfig):
        self._config = config
        self._reward: Reward

    def start(self) -> None:
        """Build the reward graph. A ValueError says what cannot be built."""
        self._reward = build_reward(self._config.graph)

    def score(self, rollouts: Rollouts) -> tuple[RewardOutput, dict[str, Any]]:
        """The scores, and a small summary that the driver may read.

        The summary has, by response, `scores` (NaN where invalid), `valid` and `parts` (lists by name), and the first
        `errors` and `seconds`.
        """
        started = time.perf_counter()
        output = checked(self._config.graph.kind, self._reward.score(rollouts), len(rollouts))
        output = without_empty_responses(output, rollouts)
        scores = output.scores - self._config.missing_eos_penalty * rollouts.is_truncated
        if self._config.clip is not None:
            scores = np.clip(scores, -self._config.clip, self._config.clip)
        output = replace(output, scores=scores)
        return output, {
            "scores": output.scores.tolist(),
            "valid": output.valid.tolist(),
            "parts": {name: values.tolist() for name, values in output.parts.items()},
            "errors": output.errors[:NUM_REPORTED_ERRORS],
            "seconds": time.perf_counter() - started,
        }


def without_empty_responses(output: RewardOutput, rollouts: Rollouts) -> RewardOutput:
    """`output` with responses of no tokens made invalid: there is no token that a score could stand on."""
    is_empty = rollouts.response_lengths == 0
    if not is_empty.any():
        return output
    sentence = f"{int(is_empty.sum())} of {len(rollouts)} responses have no tokens and are not scored"
    return replace(
        output,
        scores=np.where(is_empty, np.nan, output.scores),
        valid=output.valid & ~is_empty,
        errors=(sentence, *output.errors),
    )
