"""`raylhf reward eval`: how often a reward prefers the response that raters prefer, by subset."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raylhf.algos.agreement import cluster_bootstrap
from raylhf.batch import RewardExample
from raylhf.config.judgements import JudgementDataConfig
from raylhf.config.reward import RewardPlaneConfig
from raylhf.driver.score import BatchScorer
from raylhf.rewards.texts import TextSample
from raylhf.text.judgements import load_examples


@dataclass(frozen=True)
class SubsetAccuracy:
    """Agreement on the pairs of one subset."""

    name: str
    num_prompts: int
    num_pairs: int
    num_ties: int
    """Pairs with equal scores; each counts half."""
    num_invalid: int
    """Pairs with an invalid score; they are left out of the accuracy."""
    accuracy: float
    """Share of pairs whose chosen response has the higher score; NaN without valid pairs."""
    low: float
    high: float
    """95 % interval; prompts are drawn, because pairs of one prompt are no independent evidence. NaN for one prompt."""


@dataclass(frozen=True)
class Evaluation:
    """Agreement by subset and over all."""

    subsets: tuple[SubsetAccuracy, ...]
    """By the values of the subset key; empty where none is given."""
    overall: SubsetAccuracy
    """Every pair counts once."""
    errors: tuple[str, ...]
    """A sentence for each failure of the reward."""

    @property
    def mean_of_subsets(self) -> float:
        """Every subset counts once (RewardBench's number); NaN without subsets, or where one has no valid pair."""
        return float(np.mean([subset.accuracy for subset in self.subsets])) if self.subsets else float("nan")

    def record(self) -> dict[str, Any]:
        """As JSON: numbers, null where there is none."""
        return {
            "subsets": [_plain(subset) for subset in self.subsets],
            "overall": _plain(self.overall),
            "mean_of_subsets": None if np.isnan(self.mean_of_subsets) else self.mean_of_subsets,
            "errors": list(self.errors),
        }


def evaluate_reward(config: RewardPlaneConfig, source: Path, *, subset_key: str | None) -> Evaluation:
    """Score every response of the pairs in `source` once, and compare.

    Raises:
        ValueError: the file is missing or malformed (file and line are named), or the reward cannot be built.
    """
    if not source.exists():
        raise ValueError(f"--input {source}: there is no such file")
    data = JudgementDataConfig(path=str(source), kind="pairs", subset_key=subset_key)
    examples = load_examples(data).examples
    scores, errors = score_examples(config, examples)
    names = sorted({example.subset for example in examples}) if subset_key is not None else []
    rows = list(zip(examples, scores, strict=True))
    subsets = tuple(subset_accuracy(name, [row for row in rows if row[0].subset == name]) for name in names)
    return Evaluation(subsets, subset_accuracy("all pairs", rows), errors)


def score_examples(
    config: RewardPlaneConfig, examples: Sequence[RewardExample]
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Scores of each example's responses, float64 [K] each with NaN where invalid, and the reward's errors."""
    samples = (
        TextSample(messages=example.messages, response=response, metadata={})
        for example in examples
        for response in example.responses
    )
    scored = list(BatchScorer(config).score(samples))
    scores = np.array([np.nan if score is None else score for batch in scored for score in batch.scores])
    borders = np.cumsum([len(example.responses) for example in examples])[:-1]
    return np.split(scores, borders), tuple(error for batch in scored for error in batch.errors)


def subset_accuracy(name: str, rows: Sequence[tuple[RewardExample, np.ndarray]]) -> SubsetAccuracy:
    """Agreement of the scores with the pairs of the given examples, each with the scores of its responses [K]."""
    gaps = [
        np.array([scores[pair.chosen] - scores[pair.rejected] for pair in example.pairs]) for example, scores in rows
    ]
    # 1 for the chosen response's higher score, 0.5 for a tie, 0 else; prompts without a valid pair are empty.
    outcomes = [np.heaviside(gap[~np.isnan(gap)], 0.5) for gap in gaps]
    valid = np.concatenate([*outcomes, np.empty(0)])
    num_clusters = sum(len(outcome) > 0 for outcome in outcomes)
    low, high = cluster_bootstrap(outcomes) if num_clusters > 1 else (float("nan"), float("nan"))
    return SubsetAccuracy(
        name=name,
        num_prompts=len(rows),
        num_pairs=sum(map(len, gaps)),
        num_ties=int((valid == 0.5).sum()),
        num_invalid=sum(map(len, gaps)) - len(valid),
        accuracy=float(valid.mean()) if len(valid) else float("nan"),
        low=low,
        high=high,
    )


def _plain(accuracy: SubsetAccuracy) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and np.isnan(value) else value for key, value in asdict(accuracy).items()
    }
