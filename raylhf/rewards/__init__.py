"""The reward plane: leaves that score responses, nodes that combine scores, and the worker that serves them.

A failed score is `valid = False`, NaN and a sentence; it is never 0, which would look like a bad answer.
"""

from raylhf.rewards.build import build_reward
from raylhf.rewards.worker import RewardWorker

__all__ = ["RewardWorker", "build_reward"]
