"""Which examples a step, a rank and a micro-batch hold; what a response looks like as tokens."""

from itertools import chain

import numpy as np
import pytest

from raylhf.batch import Pair, RewardExample
from raylhf.config.reward_model import (
    BradleyTerryLoss,
    MSELoss,
    PlackettLuceLoss,
    ProcessLoss,
    TokenAggregateLoss,
    TokenStepLoss,
)
from raylhf.learner.microbatch import Layout
from raylhf.learner.reward_batch import (
    EncodedExample,
    Row,
    cut_counts,
    deal,
    draw,
    encode_example,
    pack_examples,
    pack_rows,
)
from raylhf.learner.reward_targets import target_scale
from raylhf.learner.reward_terms import require_units
from raylhf.models.tiny import byte_tokenizer


def example_of(index: int, lengths: list[int]) -> EncodedExample:
    rows = [
        Row(np.full(n, index, dtype=np.int64), np.ones(n, dtype=bool), np.zeros(0, dtype=np.int64), False, False)
        for n in lengths
    ]
    return EncodedExample(RewardExample(index, (), ("x",) * len(lengths), (Pair(0, 0),)), tuple(rows))


def test_every_epoch_draws_each_example_once_in_an_order_of_its_own():
    size = {"num_examples": 10, "batch_size": 4}
    epochs = [[draw(3 * epoch + place, **size, seed=0) for place in range(3)] for epoch in range(2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(chain.from_iterable(batches)) == list(range(10))
    assert epochs[0] != epochs[1]
    assert draw(4, **size, seed=0) == epochs[1][1]
    assert draw(4, **size, seed=1) != epochs[1][1]


def test_work_is_dealt_evenly_and_a_rank_may_get_none():
    assert deal([9, 1, 5, 4, 1], 2) == [[0, 1], [2, 3, 4]]
    assert deal([7], 3) == [[0], [], []]


@pytest.mark.parametrize(("is_packed", "max_tokens"), [(True, 22), (False, 36)])
def test_a_micro_batch_holds_whole_examples_and_at_most_its_tokens(is_packed, max_tokens):
    examples = [example_of(0, [9, 3]), example_of(1, [2, 2, 2]), example_of(2, [4]), example_of(3, [5, 5])]
    # Packed: 6 + 4 + 10 tokens, then 12. Apart: 6 rows of 5 positions, then 2 of 9 (8 rows of 9 would be 72).
    packs = pack_examples(examples, Layout(max_tokens, is_packed))
    assert [[encoded.example.index for encoded in pack] for pack in packs] == [[1, 2, 3], [0]]
    too_large = pack_examples(examples, Layout(5, is_packed))
    assert [[encoded.example.index for encoded in pack] for pack in too_large] == [[1], [2], [3], [0]]


def test_rows_are_packed_by_length():
    rows = [row for encoded in (example_of(0, [9, 3]), example_of(1, [4])) for row in encoded.rows]
    assert pack_rows(rows, Layout(12, is_packed=False)) == [[1, 2], [0]]
    assert pack_rows(rows, Layout(9)) == [[0], [1, 2]]
    assert pack_rows([], Layout(9)) == []


def test_rows_of_an_example_share_what_they_begin_with_and_keep_a_token_of_their_own():
    messages = ({"role": "user", "content": "q"},)
    judged = RewardExample(0, messages, ("abc", "abd", "a"), (Pair(0, 1),))
    rows = encode_example(byte_tokenizer(), judged, max_tokens=512).rows
    shared = rows[0].num_shared
    assert [row.num_shared for row in rows] == [shared] * 3
    text = "".join(byte_tokenizer().convert_ids_to_tokens(rows[0].ids[:shared].tolist()))
    assert text.endswith("a") and all((row.ids[:shared] == rows[0].ids[:shared]).all() for row in rows)
    same = encode_example(byte_tokenizer(), RewardExample(0, messages, ("a", "a")), max_tokens=512).rows
    assert [row.num_shared for row in same] == [len(same[0].ids) - 1] * 2


def test_steps_end_at_the_token_of_their_last_character_and_cut_ones_nowhere():
    messages = ({"role": "user", "content": "q"},)
    ends = (np.array([2, 5]),)
    judged = RewardExample(0, messages, ("ab\ncd",), step_ends=ends, step_labels=(np.array([1.0, 0.0]),))
    (row,) = encode_example(byte_tokenizer(), judged, max_tokens=512).rows
    text = byte_tokenizer().convert_ids_to_tokens(row.ids.tolist())
    assert [text[i] for i in row.step_tokens] == ["b", "d"]
    assert [text[i] for i in np.flatnonzero(row.response_mask)] == ["a", "b", "\u010a", "c", "d"]
    assert not row.is_truncated
    (cut,) = encode_example(byte_tokenizer(), judged, max_tokens=5).rows  # "ab\n" and what ends the turn
    assert cut.is_truncated
    assert cut.step_tokens.tolist() == [1, -1]


def test_cuts_are_counted_by_what_they_took():
    messages = ({"role": "user", "content": "q" * 30},)
    ends, labels = (np.array([2, 5]),), (np.array([1.0, 0.0]),)
    judged = RewardExample(0, messages, ("ab\ncd",), step_ends=ends, step_labels=labels)
    (whole,) = encode_example(byte_tokenizer(), judged, max_tokens=512).rows
    limits = range(len(whole.ids) - 1, 0, -1)
    rows = (encode_example(byte_tokenizer(), judged, max_tokens=limit).rows[0] for limit in limits)
    prompt_cut, response_cut = (next(row for row in rows if row.response_mask.sum() == left) for left in (5, 4))
    names = ("truncated_count", "response_cut_count", "steps_lost_count")
    for counted, expected in (
        ([whole], (0, 0, 0)),
        ([prompt_cut], (1, 0, 0)),
        ([whole, prompt_cut, response_cut], (2, 1, 1)),
    ):
        assert cut_counts(counted) == dict(zip(names, expected, strict=True))


NO_TOKENS = np.zeros(0, dtype=np.int64)
COMPARISONS = (
    BradleyTerryLoss(kind="bradley_terry"),
    PlackettLuceLoss(kind="plackett_luce"),
    TokenAggregateLoss(kind="token_aggregate"),
    TokenStepLoss(kind="token_step"),
)


@pytest.mark.parametrize("loss", COMPARISONS, ids=lambda loss: loss.kind)
def test_prompts_without_a_comparison_are_refused(loss):
    row = Row(np.ones(3, dtype=np.int64), np.ones(3, dtype=bool), NO_TOKENS, False, False)
    alone = EncodedExample(RewardExample(0, (), ("x",), targets=np.array([[1.0]])), (row,))
    with pytest.raises(ValueError, match=f"loss {loss.kind} finds nothing in the 2 training prompts: none has two"):
        require_units([alone, alone], loss, part="training")
    pair = EncodedExample(RewardExample(1, (), ("x", "y"), (Pair(0, 1),)), (row, row))
    require_units([alone, pair], loss, part="training")


def test_steps_without_labels_and_labels_without_steps_are_refused():
    def solution(label: float, token: int) -> EncodedExample:
        row = Row(np.ones(3, dtype=np.int64), np.ones(3, dtype=bool), np.array([token]), token < 0, token < 0)
        ends, labels = (np.array([1]),), (np.array([label]),)
        return EncodedExample(RewardExample(0, (), ("x",), step_ends=ends, step_labels=labels), (row,))

    loss = ProcessLoss(kind="process")
    with pytest.raises(ValueError, match="the 1 training prompts: no step has a label"):
        require_units([solution(np.nan, 2)], loss, part="training")
    sentence = r"the 2 held-out prompts: data.max_tokens cuts off all 1 labelled steps; raise it, or hold out others"
    with pytest.raises(ValueError, match=sentence):
        require_units([solution(1.0, -1), solution(np.nan, 2)], loss, part="held-out")
    require_units([solution(1.0, 2)], loss, part="training")


def test_held_out_responses_without_a_score_are_refused():
    row = Row(np.ones(3, dtype=np.int64), np.ones(3, dtype=bool), NO_TOKENS, False, False)
    silent = EncodedExample(RewardExample(0, (), ("x",), targets=np.array([[np.nan]])), (row,))
    with pytest.raises(ValueError, match="the 1 held-out prompts: no response has a score"):
        require_units([silent], MSELoss(kind="mse"), part="held-out")


def test_a_response_without_text_is_judged_at_its_last_token():
    (row,) = encode_example(byte_tokenizer(), RewardExample(0, (), ("",)), max_tokens=64).rows
    assert np.flatnonzero(row.response_mask).tolist() == [len(row.ids) - 1]


def test_target_constants_leave_missing_scores_out_and_weights_average_one():
    nan = np.nan
    judged = [
        RewardExample(0, (), ("a", "b"), targets=np.array([[1.0], [3.0]]), target_stds=np.array([[1.0], [nan]])),
        RewardExample(1, (), ("c", "d"), targets=np.array([[nan], [5.0]]), target_stds=np.array([[9.0], [2.0]])),
    ]
    scale = target_scale(judged, ("score",), MSELoss(kind="mse"))
    assert scale.mean.tolist() == [3.0]
    assert scale.std.tolist() == pytest.approx([np.sqrt(8 / 3)])
    assert scale.rater_std.tolist() == [1.5]  # of 1 and 2: the 9 belongs to no score
    raw = [1 / (s**2 + 8 / 3) for s in (1.0, 1.5, 2.0)]
    found = scale.rater_weights(np.array([[1.0], [nan], [2.0]]))[:, 0]
    assert found.tolist() == pytest.approx([w / np.mean(raw) for w in raw])
    np.testing.assert_allclose(scale.standardized(np.array([[3.0]])), [[0.0]])


def test_scores_that_never_differ_are_refused():
    judged = [RewardExample(0, (), ("a",), targets=np.array([[2.0]]), target_stds=np.array([[np.nan]]))] * 2
    with pytest.raises(ValueError, match="no two training scores of helpful differ"):
        target_scale(judged, ("helpful",), MSELoss(kind="mse"))
