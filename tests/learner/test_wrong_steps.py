"""Step-DPO's pairs out of process rewards: who is compared, and which tokens count."""

import numpy as np
import pytest

from raylhf.batch import Pair
from raylhf.learner.wrong_steps import first_wrong_step_pairs

RIGHT = [0, 0.5, 0, 0.25]
"""Two steps of two tokens, both right."""
WRONG_LATE = [0, 0.5, 0, 0, -0.5]
"""A right step, then a wrong one of three tokens."""
WRONG_AT_ONCE = [0, -1.0, 0, 0.5]
"""A wrong step, then a right one."""


def made(*token_scores, texts=None, valid=None):
    rows = [np.array(own, dtype=np.float32) for own in token_scores]
    scores = np.array([own.sum() for own in rows], dtype=np.float64)
    texts = texts or [str(i) for i in range(len(rows))]
    found, spans = first_wrong_step_pairs(rows, texts, scores, np.array(valid or [True] * len(rows)))
    return found, spans.tolist()


def test_a_response_without_a_wrong_step_counts_whole_and_the_other_one_by_its_wrong_step():
    found, spans = made(WRONG_LATE, RIGHT)
    assert found.pairs == (Pair(1, 0, margin=0.75),)
    assert spans == [[2, 5], [0, 4]]


def test_the_response_that_goes_wrong_later_counts_up_to_its_own_wrong_step():
    found, spans = made(WRONG_AT_ONCE, WRONG_LATE)
    assert found.pairs == (Pair(1, 0, margin=0.5),)
    assert spans == [[0, 2], [0, 2]]


def test_the_first_to_go_wrong_meets_the_one_that_stays_right_longest_and_no_other():
    found, spans = made(WRONG_LATE, WRONG_AT_ONCE, RIGHT)
    assert found.pairs == (Pair(2, 1, margin=1.25),)
    assert found.num_ties == 0
    assert spans == [[0, 5], [0, 2], [0, 4]]


@pytest.mark.parametrize(
    "group",
    [(RIGHT, RIGHT), (WRONG_LATE, [0.1, -0.2]), (WRONG_AT_ONCE, [-3.0])],
    ids=["nothing is wrong", "wrong after one step each", "wrong at once"],
)
def test_responses_that_go_equally_far_are_a_tie(group):
    found, spans = made(*group)
    assert found.pairs == () and found.num_ties == 1
    assert spans == [[0, len(own)] for own in group]


def test_what_rounding_leaves_on_the_last_token_is_no_step():
    assert made([*RIGHT, -4.8e-10], RIGHT)[0].num_ties == 1


def test_equal_responses_are_a_tie_whatever_their_scores_say():
    assert made(RIGHT, WRONG_LATE, texts=["a", "a"])[0].num_ties == 1


@pytest.mark.parametrize("valid", [[True, False], [False, False]])
def test_a_response_without_a_valid_score_is_not_compared(valid):
    found, _ = made(RIGHT, WRONG_LATE, valid=valid)
    assert found.pairs == () and found.num_ties == 0


def test_an_empty_response_is_never_wrong_and_counts_nothing():
    _, spans = made(WRONG_LATE, [], valid=[True, False])
    assert spans[1] == [0, 0]
