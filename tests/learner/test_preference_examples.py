"""From judgements to what a preference loss sees: rows, pairs, places, and how they are cut into micro-batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from raylhf.batch import Pair, RewardExample
from raylhf.config.preference import SFTConfig
from raylhf.config.preference_losses import DPOLoss, PreferenceLoss
from raylhf.learner.preference_batch import parts_of_groups, parts_of_pairs, parts_of_rows
from raylhf.learner.preference_examples import assemble, encode_examples, first_differing_step
from raylhf.models.tiny import byte_tokenizer
from raylhf.text.judgements import Split
from raylhf.text.preference_data import usable_parts

NAN, INF = np.nan, np.inf
BYTES = byte_tokenizer()
MESSAGES = ({"role": "user", "content": "why?"},)
SFT = SFTConfig(kind="sft")


def example(*responses, index=0, **settings):
    return RewardExample(index=index, messages=settings.pop("messages", MESSAGES), responses=responses, **settings)


def encode(kind, *examples, max_tokens=100, **settings):
    loss = SFT if kind == "sft" else TypeAdapter(PreferenceLoss).validate_python({"kind": kind, **settings})
    train, _ = usable_parts(Split(train=list(examples), held_out=[], sources=()), loss)
    return encode_examples(BYTES, train, loss, max_tokens=max_tokens), loss


def places(kind, **settings):
    encoded, _ = encode(kind, example("a", "b", "c", pairs=(Pair(0, 1),), **settings))
    return encoded[0].ranks.tolist()


def test_what_a_ranking_leaves_out_is_below_and_what_has_no_score_is_not_ranked():
    ranks = np.array([2.0, 1.0, NAN])
    assert places("plackett_luce", ranks=ranks) == [2, 1, INF]
    found = places("plackett_luce", ranks=ranks, targets=np.array([[0.1], [0.2], [NAN]]))
    np.testing.assert_array_equal(found, [2, 1, NAN])


def test_rankings_that_do_not_compare_are_nothing_for_plackett_luce():
    many = example("a", "b", pairs=(Pair(0, 1), Pair(1, 0)))  # of two rows
    with pytest.raises(ValueError, match=r"^data\.path holds nothing for plackett_luce: none of its 1 training"):
        encode("plackett_luce", many)
    assert len(encode("dpo", many)[0][0].pairs) == 2


@pytest.mark.parametrize("kind", ["dpo", "kto", "step_dpo"])
def test_responses_without_a_comparison_are_nothing_to_learn_from(kind):
    with pytest.raises(ValueError, match=f"holds nothing for {kind}"):
        encode(kind, example("a", "b"))


def test_sft_learns_from_responses_that_lost_to_none():
    (encoded,), _ = encode("sft", example("a", "b", "c", pairs=(Pair(0, 1), Pair(1, 2))))
    assert encoded.texts == ("a",) and encoded.pairs == ()
    with pytest.raises(ValueError, match="holds nothing for sft"):
        encode("sft", example("a", "b", pairs=(Pair(0, 1), Pair(1, 0))))


def test_good_responses_win_more_than_they_lose_or_have_the_score():
    pairs = (Pair(0, 1), Pair(0, 2), Pair(1, 2))
    (by_wins,), _ = encode("kto", example("a", "b", "c", pairs=pairs))
    np.testing.assert_array_equal(by_wins.is_good, [1, NAN, 0])
    targets = np.array([[0.3], [0.29], [NAN]])
    (by_score,), _ = encode("kto", example("a", "b", "c", targets=targets), good_from=0.3)
    np.testing.assert_array_equal(by_score.is_good, [1, 0, NAN])


@pytest.mark.parametrize(
    ("kind", "settings", "pair", "problem"),
    [
        ("ns_dpo", {}, Pair(0, 1), "the loss ns_dpo needs the field time in every row; prompt 7 has none"),
        (
            "modpo",
            {"other_weights": {"calm": 0.2, "brief": 0.1}},
            Pair(0, 1, reward_gaps={"calm": 1.0}),
            "the loss modpo needs brief in chosen_rewards and rejected_rewards of every row; prompt 7 lacks it",
        ),
    ],
)
def test_a_pair_without_what_the_loss_needs_is_named(kind, settings, pair, problem):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        encode(kind, example("a", "b", index=7, pairs=(pair,)), **settings)


def test_better_and_worse_answers_are_asked_for_before_the_last_turn():
    (encoded,), _ = encode("t_reg", example("a", "b", pairs=(Pair(0, 1),)), better="Well!", worse="Badly!")
    for prompts, asked in ((encoded.better_prompts, "Well!"), (encoded.worse_prompts, "Badly!")):
        expected = f"<|im_start|>user\n{asked}\n\nwhy?<|im_end|>\n<|im_start|>assistant\n"
        assert [BYTES.decode(ids) for ids in prompts] == [expected] * 2
    with pytest.raises(ValueError, match="asks for better and worse answers, but prompt 3 is empty"):
        encode("t_reg", example("a", "b", index=3, messages=(), pairs=(Pair(0, 1),)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("a|b|c", "a|x|c", ("a|", "b|", "x|")),
        ("a|b", "a|x|c", ("a|", "b", "x|")),
        ("b", "x", ("", "b", "x")),
        ("a|b", "a|b|c", ("a|", "b", "b|")),
        ("a|", "a|b", ("a|", "", "b")),
        ("", "b", ("", "", "b")),
    ],
)
def test_the_first_step_that_differs_stands_behind_those_that_are_shared(chosen, rejected, expected):
    assert first_differing_step(chosen, rejected, "|") == expected


def test_times_gaps_and_agreements_become_weights_of_the_pairs_they_belong_to():
    old, new = Pair(0, 1, time=1.0, agreement=0.75), Pair(1, 2, time=3.0)
    encoded, loss = encode("ns_dpo", example("a", "b", "c", pairs=(old, new)), gamma=0.5)
    batch = assemble(encoded, loss, now=4.0)
    np.testing.assert_allclose(batch.weights, [0.125, 0.5])
    np.testing.assert_array_equal(batch.smoothing, [0.25, NAN])
    gaps = Pair(0, 1, reward_gaps={"calm": 2.0, "brief": -1.0, "other": 9.0})
    encoded, loss = encode(
        "modpo", example("a", "b", pairs=(gaps,)), weight=0.5, other_weights={"calm": 0.3, "brief": 0.2}
    )
    np.testing.assert_allclose(assemble(encoded, loss, now=0.0).reward_gaps, [0.4])


def test_pairs_keep_their_keys_whatever_batch_they_are_in():
    pairs = (Pair(0, 1), Pair(0, 2))
    encoded, loss = encode("aux_dpo", *(example("a", "b", "c", index=i, pairs=pairs) for i in range(3)))
    assert assemble(encoded, loss, now=0.0).keys.tolist() == [0, 1, 2, 3, 4, 5]
    assert assemble([encoded[2], encoded[0]], loss, now=0.0).keys.tolist() == [4, 5, 0, 1]


def test_a_batch_that_stands_in_for_none_counts_nothing():
    encoded, loss = encode("kto", example("a", "b", pairs=(Pair(0, 1),)))
    batch = assemble(encoded, loss, now=0.0, counts=False)
    assert len(batch) == 2 and len(batch.chosen) == 0
    assert not batch.mask(torch.device("cpu")).any()
    assert np.isnan(batch.is_good).all() and np.isnan(batch.ranks).all()


@st.composite
def batches(draw):
    """Groups of responses of many lengths, with pairs that share some of them."""
    groups = []
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.integers(2, 5))
        texts = [chr(97 + k) * draw(st.integers(0, 9)) for k in range(size)]
        all_pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
        chosen = draw(st.lists(st.sampled_from(all_pairs), min_size=1, max_size=6))
        groups.append(example(*texts, index=index, pairs=tuple(Pair(*pair) for pair in chosen)))
    encoded, loss = encode("dpo", *groups)
    return assemble(encoded, loss, now=0.0)


@given(batches(), st.integers(1, 9), st.booleans())
def test_every_pair_stands_in_one_micro_batch_with_its_rows(batch, size, may_share):
    parts = parts_of_pairs(batch, lambda rows: len(rows) <= size, may_share=may_share)
    assert sorted(pair for part in parts for pair in part.pairs) == list(range(len(batch.chosen)))
    for part in parts:
        assert len(part.rows) == len(set(part.rows)) <= max(size, 2)
        assert {int(row) for n in part.pairs for row in (batch.chosen[n], batch.rejected[n])} == set(part.rows)
        local = part.local_pairs(batch, torch.device("cpu"))
        assert [part.rows[i] for i in local.chosen] == batch.chosen[list(part.pairs)].tolist()
        if not may_share:
            assert len(part.rows) == 2 * len(part.pairs)


@given(batches(), st.integers(1, 9))
def test_every_row_and_every_group_stands_in_one_micro_batch(batch, size):

    def fits(rows):
        return len(rows) <= size

    rows, groups = parts_of_rows(batch, fits), parts_of_groups(batch, fits)
    assert sorted(row for part in rows for row in part.rows) == list(range(len(batch)))
    assert all(len(part.rows) <= size for part in rows)
    whole = [tuple(part.rows[i] for i in group) for part in groups for group in part.groups]
    assert sorted(whole) == list(batch.groups)
    assert all(len(part.rows) <= size or len(part.groups) == 1 for part in groups)


def test_mismatched_responses_stand_behind_the_next_prompt_of_all():
    texts = ("one", "two", "three")
    messages = [({"role": "user", "content": text},) for text in texts]
    pairs = (Pair(0, 1),)
    encoded, loss = encode("kto", *(example("a", "b", messages=m, pairs=pairs) for m in (*messages, messages[0])))
    batch = assemble(encoded, loss, now=0.0)
    first, second, third, again = batch.group_prompts
    assert again.tolist() == first.tolist()
    behind = batch.mismatched([second, first, third], max_tokens=None).prompt_ids
    assert [ids.tolist() for ids in behind] == [
        ids.tolist() for ids in (third, third, first, first, second, second, third, third)
    ]
    assert batch.mismatched([second, first, third], max_tokens=None).response_ids is batch.response_ids
    cut = batch.mismatched([second, first, third], max_tokens=8).prompt_ids
    assert [ids.tolist() for ids in cut] == [ids.tolist()[-6:] for ids in behind]


def test_ties_are_left_out_and_a_held_out_part_of_ties_is_empty():
    tied, better = example("a", "b"), example("a", "b", index=1, pairs=(Pair(0, 1),))
    split = Split(train=[tied, better, tied], held_out=[tied], sources=())
    assert usable_parts(split, DPOLoss()) == ([better], [])


def test_times_in_too_small_a_unit_are_told():
    days = [example("a", "b", index=k, pairs=(Pair(0, 1, time=86_400.0 * k),)) for k in range(3)]
    with pytest.raises(ValueError, match=r"^objective\.loss\.gamma = 0\.95 leaves half of the pairs a weight"):
        encode("ns_dpo", *days)
    assert len(encode("ns_dpo", *days, gamma=1.0)[0]) == 3
