"""Scores move between tokenizations by characters, and none is lost."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raylhf.models.tiny import byte_tokenizer
from raylhf.rewards.alignment import lay_out_scores, token_ends

BYTES: Any = byte_tokenizer()
END = BYTES.eos_token_id
TEXTS = st.text(alphabet=st.sampled_from("ab \n.\u00e9\u4f60\ufffd\U0001f600\u200d\U0001f467"), max_size=20)


def merging_tokenizer():
    """Byte-level BPE with merges over spaces, letters and inside multi-byte characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    emoji = [BYTES.convert_ids_to_tokens(i) for i in BYTES.encode("\U0001f600")]
    merges = [
        ("a", "b"),
        ("\u0120", "a"),
        ("\u0120", "ab"),
        (emoji[0], emoji[1]),
        (emoji[2], emoji[3]),
        ("b", emoji[0]),
    ]
    vocabulary = [*alphabet, *(left + right for left, right in merges if left + right not in alphabet)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


MERGING: Any = merging_tokenizer()


def test_a_split_character_belongs_to_the_token_that_completes_it():
    ids = [*BYTES.encode("a\u00e9\U0001f600"), END]
    assert token_ends(BYTES, ids, "a\u00e9\U0001f600").tolist() == [1, 1, 2, 2, 2, 2, 3, 3]


def test_a_response_cut_inside_a_character_ends_with_its_text():
    ids = BYTES.encode("a\U0001f600")[:3]
    text = BYTES.decode(ids, skip_special_tokens=True)
    assert token_ends(BYTES, ids, text).tolist() == [1, 1, len(text)]


def test_a_stop_token_that_the_text_leaves_out_adds_no_characters():
    assert token_ends(BYTES, BYTES.encode("ab!"), "ab").tolist() == [1, 2, 2]


def test_a_decoder_that_tidies_white_space_falls_back_to_prefixes():
    class Tidy:
        backend_tokenizer = BYTES.backend_tokenizer

        def decode(self, ids, skip_special_tokens):
            return BYTES.decode(ids, skip_special_tokens=skip_special_tokens).replace(" .", ".")

    assert token_ends(Tidy(), BYTES.encode("a .b"), "a.b").tolist() == [1, 1, 2, 3]


def test_no_tokens_have_no_ends():
    assert token_ends(BYTES, [], "").tolist() == []
    assert lay_out_scores(np.array([1.0]), np.array([[0, 1]]), np.array([], dtype=np.int64)).tolist() == []


def test_a_score_goes_where_its_last_character_is_completed_and_the_rest_to_the_end():
    ends = np.array([2, 2, 5, 5])  # two characters, a part of one, three more, the end token
    spans = np.array([[0, 1], [1, 3], [3, 5], [-1, -1]])
    laid = lay_out_scores(np.array([1.0, 2.0, 4.0, 8.0]), spans, ends)
    assert laid.tolist() == [1.0, 0.0, 6.0, 8.0] and laid.dtype == np.float32


@settings(max_examples=200)
@given(TEXTS, st.booleans(), st.integers(min_value=0, max_value=2**32 - 1), st.booleans())
def test_scores_keep_their_sum_between_tokenizations(text, is_bytes_first, seed, has_end):
    policy, model = (BYTES, MERGING) if is_bytes_first else (MERGING, BYTES)
    ids = policy.encode(text) + [END] * (has_end and policy is BYTES)
    assert policy.decode(ids, skip_special_tokens=True) == text
    ends = token_ends(policy, ids, text)
    assert len(ends) == len(ids) and (np.diff(ends) >= 0).all() and (len(ends) == 0 or ends[-1] == len(text))
    encoding = model.backend_tokenizer.encode(text, add_special_tokens=False)
    spans = np.array([*encoding.offsets, (-1, -1)]).reshape(-1, 2)
    scores = np.random.default_rng(seed).normal(size=len(spans)) * 10
    laid = lay_out_scores(scores, spans, ends)
    if len(ids):
        assert laid.sum(dtype=np.float64) == pytest.approx(scores.sum(), abs=1e-4)


@given(st.booleans(), TEXTS, st.integers(min_value=0, max_value=20))
def test_a_character_is_complete_with_the_token_that_brings_its_last_byte(is_bytes, text, cut):
    """Without U+FFFD itself, which decoders also write for bytes that are no character."""
    tokenizer = BYTES if is_bytes else MERGING
    ids = tokenizer.encode(text.replace("\ufffd", ""))[: cut or None]
    decoded = tokenizer.decode(ids)
    ends = token_ends(tokenizer, ids, decoded)
    for t in range(len(ids) - 1):
        complete = bytes_of(tokenizer, ids[: t + 1]).decode("utf-8", errors="ignore")
        assert decoded[: ends[t]] == complete


def bytes_of(tokenizer, ids):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    return bytes(byte_of[symbol] for token in tokenizer.convert_ids_to_tokens(ids) for symbol in token)


def test_a_long_run_of_broken_bytes_still_ends_with_its_text():
    ids = [BYTES.encode("\u00e9")[0]] * 50 + BYTES.encode("ok")
    text = BYTES.decode(ids)
    ends = token_ends(BYTES, ids, text)
    assert ends[-1] == len(text) and (np.diff(ends) >= 0).all()
