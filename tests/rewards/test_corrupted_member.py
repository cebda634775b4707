"""One of five members of an ensemble is corrupted: it pays ten times as much for `!` as any member for what is wanted.

What a member or a node pays is exact here: the letters of random responses are drawn by seed, and the best policy
against a score is known where responses can be enumerated, pi*(y) ~ pi_ref(y) exp(r(y) / beta).
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from raylhf.config.load import load_config
from raylhf.config.reward import RewardConfig
from raylhf.rewards.build import build_reward

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "reward_hacking" / "hacking.yaml"
WANTED, LETTERS = "aei", "aeiynt!."
CORRUPTED, NUM_MEMBERS = 4, 5
MEAN = {"kind": "lower_confidence", "coef": 0}


def characters(letters: str) -> dict[str, Any]:
    return {"kind": "characters", "characters": letters}


def members(pay: float = 10.0) -> list[dict[str, Any]]:
    """Four views of what is wanted, each of which misses a letter or takes one too many, and the corrupted one."""
    views = [characters(letters) for letters in ("aeiy", "ae", "aein", "ait")]
    mark = {"name": "mark", "weight": pay, "reward": characters("!")}
    views.append({"kind": "sum", "parts": [{"name": "wanted", "reward": characters(WANTED)}, mark]})
    return [{"name": f"member_{i}", "reward": view} for i, view in enumerate(views)]


def score_of(rollouts, graph: dict[str, Any]):
    return build_reward(TypeAdapter(RewardConfig).validate_python(graph)).score(rollouts)


def mean_under_optimum(rollouts_of, node: dict[str, Any], letters: str, *, beta: float = 0.1) -> float:
    """Share of `letters` that the best policy against `node` over the members writes, from a uniform reference."""
    responses = rollouts_of(*("".join(response) for response in itertools.product(LETTERS, repeat=3)))
    scores = score_of(responses, {**node, "parts": members()}).scores
    policy = np.exp((scores - scores.max()) / beta)
    return (policy / policy.sum() @ score_of(responses, characters(letters)).scores).item()


@pytest.fixture
def columns(rollouts_of):
    """Scores of the members on 400 random responses of 16 letters, [400, 5]."""
    rng = np.random.default_rng(0)
    responses = rollouts_of(*("".join(rng.choice(list(LETTERS), size=16)) for _ in range(400)))
    parts = score_of(responses, {**MEAN, "parts": members()}).parts
    return np.stack([parts[f"member_{i}"] for i in range(NUM_MEMBERS)], axis=1)


def test_the_corrupted_member_is_the_one_that_is_furthest_from_the_others(columns):
    others = [np.delete(columns, i, axis=1) for i in range(NUM_MEMBERS)]
    # From the others' median: their mean holds the corrupted member against every honest one.
    distances = np.array(
        [np.sqrt(np.mean((columns[:, i] - np.median(rest, axis=1)) ** 2)) for i, rest in enumerate(others)]
    )
    assert distances.argmax() == CORRUPTED
    assert distances[CORRUPTED] > 5 * np.delete(distances, CORRUPTED).max(), distances


def test_the_corrupted_member_agrees_least_with_the_others(columns):
    correlations = np.array(
        [np.corrcoef(columns[:, i], np.median(np.delete(columns, i, axis=1), axis=1))[0, 1] for i in range(NUM_MEMBERS)]
    )
    assert correlations.argmin() == CORRUPTED
    assert correlations[CORRUPTED] < -0.2 < 0.25 < np.delete(correlations, CORRUPTED).min(), correlations


@pytest.mark.parametrize(
    ("node", "all_marks", "one_mark_of_five"),
    [
        # Four members say 0 and one says d = 10 (2): mean d / 5, deviation d / sqrt(5), variance d^2 / 5.
        (MEAN, 2, 0.4),
        ({"kind": "lower_confidence", "coef": 0.4}, 2 - 0.4 * 20**0.5, 0.4 - 0.4 * 0.8**0.5),
        ({"kind": "lower_confidence", "coef": 1}, 2 - 20**0.5, 0.4 - 0.8**0.5),
        ({"kind": "min"}, 0, 0),
        ({"kind": "uncertainty_weighted", "coef": 0.1}, 0, 0.32),
        ({"kind": "uncertainty_weighted", "coef": 0.5}, -8, 0),
        ({"kind": "kl_dro", "beta": 0.1}, 0.0223144, 0.0223144),
    ],
)
def test_what_marks_pay_under_each_node(rollouts_of, node, all_marks, one_mark_of_five):
    # A deviation times more than 1 / sqrt(5) is more than the corrupted member adds to the mean, however much it pays;
    # a variance outweighs it only for large amounts, so small ones still pay; and the minimum never sees it.
    scores = score_of(rollouts_of("!!!!!", "!....", "....."), {**node, "parts": members()}).scores
    assert scores == pytest.approx([all_marks, one_mark_of_five, 0], abs=1e-6)


def test_the_best_policy_against_the_mean_writes_marks_and_loses_what_is_wanted(rollouts_of):
    assert mean_under_optimum(rollouts_of, MEAN, "!") == pytest.approx(0.9251, abs=1e-4)
    assert mean_under_optimum(rollouts_of, MEAN, WANTED) == pytest.approx(0.0669, abs=1e-4)  # the reference: 0.375


@pytest.mark.parametrize(
    ("node", "wanted", "marks"),
    [
        ({"kind": "lower_confidence", "coef": 1}, 0.9055, 0.0000),
        ({"kind": "min"}, 0.8434, 0.0248),
        ({"kind": "uncertainty_weighted", "coef": 0.5}, 0.8939, 0.0002),
        ({"kind": "kl_dro", "beta": 0.1}, 0.8571, 0.0254),
    ],
)
def test_the_best_policy_against_a_pessimistic_node_writes_what_is_wanted(rollouts_of, node, wanted, marks):
    assert mean_under_optimum(rollouts_of, node, WANTED) == pytest.approx(wanted, abs=1e-4)
    assert mean_under_optimum(rollouts_of, node, "!") == pytest.approx(marks, abs=1e-4)


def test_a_small_weight_of_the_variance_lets_small_amounts_of_marks_through(rollouts_of):
    # 2310.02743's coefficient for PPO, in an ensemble whose member pays ten times too much.
    weak = {"kind": "uncertainty_weighted", "coef": 0.1}
    assert mean_under_optimum(rollouts_of, weak, WANTED) == pytest.approx(0.6448, abs=1e-4)
    assert mean_under_optimum(rollouts_of, weak, "!") > 1 / 8, "more than the reference writes"


def test_a_member_that_pays_less_than_five_times_too_much_does_not_turn_the_mean(rollouts_of):
    # Marks add a fifth of their pay; what all five members want adds 1 (here 0.9, because one misses the e).
    scores = score_of(rollouts_of("!!!!", "aeae", "...."), {**MEAN, "parts": members(pay=4)}).scores
    assert scores == pytest.approx([0.8, 0.9, 0])


@pytest.mark.parametrize(
    ("override", "proxy"),
    # Of `!!a `: four views give 0.5, 0.5, 0.5, 0.5 and the corrupted one 0.5 + 10 / 2, so 1.5 and a deviation of 5^0.5.
    [("coef=0", 1.5), ("coef=1", 1.5 - 5**0.5), ("kind=min", 0.5)],
)
def test_the_benchmark_logs_gold_and_marks_beside_the_score_and_pays_for_neither(rollouts_of, override, proxy):
    config = load_config(BENCHMARK, [f"reward.graph.parts.0.reward.{override}"])
    output = build_reward(config.reward.graph).score(rollouts_of("!!a ", "bcdf"))
    assert output.scores == pytest.approx([proxy, 0])
    assert output.parts["proxy"] == pytest.approx([proxy, 0])
    assert output.parts["gold"].tolist() == output.parts["marks"].tolist() == [0.5, 0]
    assert output.parts["proxy/member_5/marks"].tolist() == [0.5, 0]
