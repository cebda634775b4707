import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylhf.algos.pairs import MadePairs, PairKind, make_pairs
from raylhf.batch import Pair

NAN = math.nan
KINDS: tuple[PairKind, ...] = ("best_worst", "all_pairs", "random_against_best", "pareto")

# A coarse grid makes ties common.
scores_of_a_group = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0, NAN]), max_size=7)


def made(kind, *scores, valid=None, vector=None, tie_margin=0.0, seed=0, texts=None) -> MadePairs:
    return make_pairs(
        kind,
        np.array(scores, dtype=np.float64),
        np.ones(len(scores), dtype=bool) if valid is None else np.array(valid, dtype=bool),
        vector=None if vector is None else np.array(vector, dtype=np.float64),
        tie_margin=tie_margin,
        seed=seed,
        texts=texts,
    )


def columns_of(scores):
    """A vector whose columns both agree with the scores."""
    return np.stack([scores, 2 * np.array(scores)], axis=1) if len(scores) else np.zeros((0, 2))


def test_the_first_of_the_best_meets_the_first_of_the_worst():
    assert made("best_worst", 0.1, 0.9, 0.4, 0.9) == MadePairs((Pair(1, 0, 0.9 - 0.1),), 0)
    assert made("best_worst", 0.5, 0.2, 0.2) == MadePairs((Pair(0, 1, 0.3),), 0)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_equal_scores_are_a_tie_and_give_no_pair(kind):
    assert made(kind, 0.3, 0.3) == MadePairs((), 1)


def test_every_two_responses_are_compared_in_the_order_of_their_positions():
    pairs = made("all_pairs", 1.0, 3.0, 1.0, 0.0)
    assert pairs.pairs == (Pair(1, 0, 2.0), Pair(0, 3, 1.0), Pair(1, 2, 2.0), Pair(1, 3, 3.0), Pair(2, 3, 1.0))
    assert pairs.num_ties == 1


def test_the_best_meets_every_other_response_equally_often():
    rejected = [made("random_against_best", 0.1, 0.9, 0.4, 0.2, seed=seed).pairs[0].rejected for seed in range(600)]
    counts = np.bincount(rejected, minlength=4)
    assert counts[1] == 0
    assert all(abs(count - 200) < 4 * math.sqrt(600 * 2 / 9) for count in counts[[0, 2, 3]])


def test_pareto_pairs_need_no_loss_in_any_column():
    # 0 dominates 2; 1 beats each of the others somewhere; 3 dominates 2 by one column alone.
    vector = [[2.0, 2.0], [3.0, 0.0], [1.0, 1.0], [1.0, 2.0]]
    scores = [2.0, 1.5, 1.0, 1.5]
    pairs = made("pareto", *scores, vector=vector)
    assert [(pair.chosen, pair.rejected) for pair in pairs.pairs] == [(0, 2), (0, 3), (3, 2)]
    assert [pair.agreement for pair in pairs.pairs] == [1.0, 0.5, 0.5]
    assert [pair.margin for pair in pairs.pairs] == [1.0, 0.5, 0.5]
    assert pairs.num_ties == 0


def test_a_pareto_pair_that_the_scores_contradict_is_a_tie():
    assert made("pareto", 0.0, 1.0, vector=[[1.0, 1.0], [0.0, 0.0]]) == MadePairs((), 1)


def test_pareto_pairs_are_of_the_columns_that_both_have():
    assert made("pareto", 1.0, 0.0, vector=[[1.0, NAN], [0.0, 5.0]]).pairs == (Pair(0, 1, 1.0, agreement=1.0),)
    assert made("pareto", 1.0, 0.0, vector=[[1.0, NAN], [NAN, 5.0]]) == MadePairs((), 0)


def test_pareto_pairs_without_a_vector_are_refused():
    with pytest.raises(ValueError, match="vector"):
        made("pareto", 1.0, 0.0)


def test_agreement_is_the_share_of_members_that_rate_the_chosen_response_higher():
    vector = [[1.0, 0.0, 2.0, NAN], [0.0, 1.0, 2.0, 5.0]]
    assert made("best_worst", 1.0, 0.0, vector=vector).pairs == (Pair(0, 1, 1.0, agreement=1 / 3),)
    assert made("best_worst", 1.0, 0.0, vector=[[NAN], [1.0]]).pairs == (Pair(0, 1, 1.0, agreement=None),)
    assert made("best_worst", 1.0, 0.0).pairs == (Pair(0, 1, 1.0, agreement=None),)


@pytest.mark.parametrize(("tie_margin", "num_pairs"), [(0.0, 1), (0.49, 1), (0.5, 0), (0.51, 0)])
def test_a_gap_of_the_tie_margin_is_still_a_tie(tie_margin, num_pairs):
    pairs = made("best_worst", 1.0, 0.5, tie_margin=tie_margin)
    assert (len(pairs.pairs), pairs.num_ties) == (num_pairs, 1 - num_pairs)


def test_identical_responses_are_never_paired():
    pairs = made("all_pairs", 1.0, 0.5, 0.0, texts=["same", "same", "other"])
    assert [(pair.chosen, pair.rejected) for pair in pairs.pairs] == [(0, 2), (1, 2)]
    assert pairs.num_ties == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scores", "valid"), [([], []), ([1.0], [True]), ([1.0, 2.0], [True, False]), ([1.0, NAN], [True, True])]
)
def test_a_group_with_fewer_than_two_valid_responses_has_no_pair(kind, scores, valid):
    assert made(kind, *scores, valid=valid, vector=columns_of(scores)) == MadePairs((), 0)


@settings(deadline=None)
@given(st.sampled_from(KINDS), scores_of_a_group, st.data())
def test_pairs_are_of_valid_responses_whose_scores_differ_by_more_than_the_tie_margin(kind, scores, data):
    size = len(scores)
    valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    texts = data.draw(st.lists(st.sampled_from("ab"), min_size=size, max_size=size))
    tie_margin, seed = data.draw(st.sampled_from([0.0, 0.25, 1.0])), data.draw(st.integers(0, 2**31))
    options = {"vector": columns_of(scores), "tie_margin": tie_margin, "seed": seed, "texts": texts}
    result = made(kind, *scores, valid=valid, **options)
    usable = {row for row in range(size) if valid[row] and not math.isnan(scores[row])}
    for pair in result.pairs:
        assert {pair.chosen, pair.rejected} <= usable
        assert pair.margin == scores[pair.chosen] - scores[pair.rejected] > tie_margin
        assert texts[pair.chosen] != texts[pair.rejected]
        assert pair.agreement == 1.0
    assert len({frozenset((pair.chosen, pair.rejected)) for pair in result.pairs}) == len(result.pairs)
    assert result == made(kind, *scores, valid=valid, **options)
    if kind == "all_pairs":
        assert len(result.pairs) + result.num_ties == math.comb(len(usable), 2)
    elif kind == "pareto":
        unequal = sum(scores[i] != scores[j] for i, j in itertools.combinations(usable, 2))
        assert len(result.pairs) + result.num_ties == unequal
    else:
        assert len(result.pairs) + result.num_ties == (len(usable) > 1)
