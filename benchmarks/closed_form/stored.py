"""Judgements of the 64 responses, as a stored data set would hold them, for PreferenceLearnerWorker."""

from collections.abc import Callable, Sequence

import numpy as np
from closed_form.enumerable import BETA, CHOSEN, PROMPT, REJECTED, RESPONSES, Problem

from raylhf.batch import Pair
from raylhf.config.run import PreferenceRunConfig
from raylhf.learner.preference_examples import PreferenceExample
from raylhf.learner.preference_worker import PreferenceLearnerWorker
from raylhf.models.policy_text import EncodedResponse

Data = Callable[[Problem, int, np.random.Generator], list[PreferenceExample]]
"""(problem, optimizer steps, rng) to the judgements of a run that sees each once."""

_ALL = tuple(range(len(RESPONSES)))
_UPPER = np.flatnonzero(CHOSEN < REJECTED)
"""Every two responses once, of the 4032 ordered pairs."""


class TokenPreferenceWorker(PreferenceLearnerWorker):
    """The learner on judgements that are tokens already: the enumerable problem has no texts and no tokenizer."""

    def __init__(self, config: PreferenceRunConfig, folder: str, examples: Sequence[PreferenceExample]) -> None:
        super().__init__(config, folder, folder, rank=0)
        self._examples = list(examples)

    def _read(self) -> str:
        self._train, self._held_out = self._examples, []
        self._now = max((pair.time or 0.0 for example in self._train for pair in example.pairs), default=0.0)
        return ""


def probabilities(problem: Problem, num_steps: int, rng: np.random.Generator) -> list[PreferenceExample]:
    """Every two responses once, with the share of raters that prefer the better one: no sampling noise at all."""
    sure = problem.preference().numpy()
    pairs = [
        _pair(n, chosen_wins=bool(sure[n] >= 0.5), agreement=float(max(sure[n], 1 - sure[n]))) for n in _UPPER.tolist()
    ]
    return [_example(_ALL, pairs)]


def drawn(noise: float = 0.0, second_reward: bool = False) -> Data:
    """For every step, a new drawn label for every two responses; each flipped with probability `noise`."""

    def data(problem: Problem, num_steps: int, rng: np.random.Generator) -> list[PreferenceExample]:
        sure = problem.preference(noise).numpy()[_UPPER]
        others = other_rewards(problem) if second_reward else np.zeros(len(RESPONSES))
        return [
            _example(
                _ALL,
                [
                    _pair(n, chosen_wins=bool(wins), time=float(step), others=others)
                    for n, wins in zip(_UPPER.tolist(), rng.random(len(sure)) < sure, strict=True)
                ],
            )
            for step in range(num_steps)
        ]

    return data


def sure_labels(problem: Problem, num_steps: int, rng: np.random.Generator) -> list[PreferenceExample]:
    """Every two responses once; the one with the higher reward always wins."""
    sure = problem.preference().numpy()
    return [_example(_ALL, [_pair(n, chosen_wins=bool(sure[n] >= 0.5)) for n in _UPPER.tolist()])]


def rankings(problem: Problem, num_steps: int, rng: np.random.Generator) -> list[PreferenceExample]:
    """For every step, a Plackett-Luce ranking of all responses in random groups of eight."""
    rewards = problem.rewards.numpy()
    examples = []
    for _ in range(num_steps):
        for group in rng.permutation(len(RESPONSES)).reshape(-1, 8):
            # Sorting r + Gumbel noise draws from the Plackett-Luce model.
            noisy = rewards[group] + rng.gumbel(size=len(group))
            examples.append(_example(group.tolist(), [], ranks=np.argsort(np.argsort(-noisy)) + 1.0))
    return examples


def good_or_bad(problem: Problem, num_steps: int, rng: np.random.Generator) -> list[PreferenceExample]:
    """Two examples a step, in which every response is good with probability sigmoid(r - median r)."""
    sure = good_share(problem)
    return [_example(_ALL, [], is_good=(rng.random(len(sure)) < sure).astype(np.float64)) for _ in range(2 * num_steps)]


def good_share(problem: Problem) -> np.ndarray:
    """Probability [64] that a response is judged good."""
    rewards = problem.rewards
    return (rewards - rewards.median()).sigmoid().numpy()


def other_rewards(problem: Problem) -> np.ndarray:
    """A second reward [64], for MODPO."""
    return np.random.default_rng((problem.seed, 1)).normal(scale=BETA, size=len(RESPONSES))


def _pair(
    place: int,
    *,
    chosen_wins: bool,
    agreement: float | None = None,
    time: float | None = None,
    others: np.ndarray | None = None,
) -> Pair:
    """Ordered pair number `place`, or its reverse."""
    better, worse = int(CHOSEN[place]), int(REJECTED[place])
    if not chosen_wins:
        better, worse = worse, better
    gaps = {} if others is None else {"other": float(others[better] - others[worse])}
    return Pair(better, worse, agreement=agreement, time=time, reward_gaps=gaps)


def _example(
    members: Sequence[int],
    pairs: Sequence[Pair],
    *,
    ranks: np.ndarray | None = None,
    is_good: np.ndarray | None = None,
) -> PreferenceExample:
    unknown = np.full(len(members), np.nan)
    return PreferenceExample(
        prompt="",
        texts=("",) * len(members),
        rows=tuple(EncodedResponse(PROMPT, RESPONSES[i], False, False) for i in members),
        pairs=tuple(pairs),
        first_key=0,
        ranks=unknown if ranks is None else ranks,
        is_good=unknown if is_good is None else is_good,
    )
