"""What stands around every leaf of a reward graph: its name, its failure policy, and the record of its calls."""

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.config.reward_leaves import FailurePolicy
from raylhf.rewards.state import Call, RewardState
from raylhf.rewards.validity import NUM_TOLD_ERRORS, RewardFailedError, all_invalid, checked, result_or_reason
from raylhf.tracking.redaction import without_secrets

if TYPE_CHECKING:  # the Protocols name torch's types, and a reward worker needs no torch
    from raylhf.interfaces import Reward


class Source:
    """One leaf in its place. Its output is checked, and the columns of its `vector` are named parts as well.

    A failed score is invalid; then the policy says whether it is dropped, stops the run with a RewardFailedError, or
    asks for the prompt's group to be sampled anew.
    """

    def __init__(self, name: str, reward: "Reward", on_failure: FailurePolicy, state: RewardState):
        """`name` is the path of part names to the leaf, or its kind where it is the whole graph."""
        self.name = name
        self.calibration = getattr(reward, "calibration", None)
        """Statistics of a reward model's scores on its calibration set; None where the leaf has none."""
        self._reward = reward
        self._on_failure = on_failure
        self._state = state

    def score(self, rollouts: Rollouts) -> RewardOutput:
        started = time.perf_counter()
        output = self._score_or_fail(rollouts)
        failed, scored = ~output.valid, output.scores[output.valid]
        self._state.record_call(
            Call(
                source=self.name,
                seconds=time.perf_counter() - started,
                num_responses=len(rollouts),
                num_failed=int(failed.sum()),
                num_truncated=output.num_truncated,
                score_mean=float(scored.mean()) if len(scored) else float("nan"),
                score_std=float(scored.std()) if len(scored) else float("nan"),
            )
        )
        if failed.any() and self._on_failure == "raise":
            reasons = "; ".join(output.errors[:NUM_TOLD_ERRORS]) or "the reward gave no reason"
            raise RewardFailedError(
                f"reward {self.name}: {int(failed.sum())} of {len(rollouts)} scores failed, and its on_failure is "
                f"raise: {reasons}"
            )
        return replace(output, resample=failed if self._on_failure == "resample" and failed.any() else None)

    def _score_or_fail(self, rollouts: Rollouts) -> RewardOutput:
        """The leaf's checked output; whatever the leaf raises makes every score of the call invalid."""
        leaf = type(self._reward).__name__
        output = result_or_reason(lambda: checked(leaf, self._reward.score(rollouts), len(rollouts)))
        if isinstance(output, str):
            return all_invalid(len(rollouts), without_secrets(f"{leaf}: {output}"), ())
        return with_columns_as_parts(with_fitting_tokens(leaf, output, rollouts))


def with_fitting_tokens(name: str, output: RewardOutput, rollouts: Rollouts) -> RewardOutput:
    """`output`, invalid in rows whose dense scores are not one finite number a response token."""
    if output.token_scores is None:
        return output
    lengths = rollouts.response_lengths
    fits = np.array(
        [len(row) == n and bool(np.isfinite(row).all()) for row, n in zip(output.token_scores, lengths, strict=True)],
        dtype=bool,
    )
    broken = output.valid & ~fits
    rows = [
        row if ok else np.zeros(n, np.float32) for row, ok, n in zip(output.token_scores, fits, lengths, strict=True)
    ]
    if not broken.any():
        return replace(output, token_scores=rows)
    sentence = f"{name}: {int(broken.sum())} rows of token scores are not one finite number a response token"
    return replace(
        output,
        scores=np.where(broken, np.nan, output.scores),
        valid=output.valid & fits,
        token_scores=rows,
        errors=(*output.errors, sentence),
    )


def with_columns_as_parts(output: RewardOutput) -> RewardOutput:
    """`output` with the columns of its `vector` among its parts, and all parts under names that a metric may have."""
    columns = {} if output.vector is None else dict(zip(output.vector_names, output.vector.T, strict=True))
    parts = columns | dict(output.parts)
    names = log_names(parts)
    return replace(output, parts={names[name]: scores for name, scores in parts.items()})


def log_names(names: Iterable[str]) -> dict[str, str]:
    """The `log_name` of each name; of names that would share one, all but the first get a suffix (`_2`, `_3`...)."""
    found: dict[str, str] = {}
    # A name that needs no change comes first and keeps it; sorted, so that the order in which a server names its parts
    # does not matter.
    for name in sorted(names, key=lambda name: (name != log_name(name), name)):
        wanted, taken = log_name(name), set(found.values())
        free = (f"{wanted}_{k}" if k > 1 else wanted for k in count(1))
        found[name] = next(candidate for candidate in free if candidate not in taken)
    return found


def log_name(name: str) -> str:
    """`name` in the letters of metric keys: lower case, digits, `_` and `/`."""
    return re.sub(r"[^a-z0-9_/]+", "_", name.lower())
