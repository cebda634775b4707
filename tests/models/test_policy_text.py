"""Given responses as the tokens that a policy would have sampled."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylhf.models.policy_text import EncodedResponse, encode_responses
from raylhf.models.tiny import byte_tokenizer

PROMPT = ({"role": "user", "content": "why?"},)
BYTES = byte_tokenizer()
END = BYTES.eos_token_id
FRAME = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
PROMPT_LENGTH = len(BYTES.encode(FRAME))


def encode_response(tokenizer, messages, response, *, ends=True, **settings) -> EncodedResponse:
    """A single response."""
    (encoded,) = encode_responses(tokenizer, messages, [response], ends=[ends], **settings)
    return encoded


def without(*names):
    """The tokenizer without some of its special tokens, or its chat template."""
    tokenizer = byte_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


def test_the_prompt_ends_where_the_policy_begins_and_the_response_with_its_end():
    encoded = encode_response(BYTES, PROMPT, "so.", max_tokens=100)
    assert BYTES.decode(encoded.prompt_ids) == FRAME
    assert BYTES.decode(encoded.response_ids) == "so.<|im_end|>"
    assert encoded.response_ids[-1] == END
    assert encoded.prompt_ids.dtype == encoded.response_ids.dtype == np.int64
    assert not encoded.is_truncated and not encoded.is_response_cut


def test_words_of_the_template_inside_a_response_are_text():
    encoded = encode_response(BYTES, PROMPT, "assistant\n", max_tokens=100)
    assert BYTES.decode(encoded.response_ids[:-1]) == "assistant\n"


def test_an_empty_response_is_its_end_even_where_the_turn_goes_on():
    for ends in (True, False):
        assert encode_response(BYTES, PROMPT, "", max_tokens=100, ends=ends).response_ids.tolist() == [END]


def test_a_step_stands_behind_the_steps_before_it_and_ends_only_with_the_turn():
    encoded = encode_response(BYTES, PROMPT, "b\n\n", max_tokens=100, prefix="a\n\n", ends=False)
    assert BYTES.decode(encoded.prompt_ids) == FRAME + "a\n\n"
    assert BYTES.decode(encoded.response_ids) == "b\n\n"
    last = encode_response(BYTES, PROMPT, "c", max_tokens=100, prefix="a\n\nb\n\n")
    assert BYTES.decode(last.response_ids) == "c<|im_end|>"


def test_a_long_prompt_loses_its_beginning_and_the_response_nothing():
    encoded = encode_response(BYTES, PROMPT, "so.", max_tokens=14)
    assert BYTES.decode(encoded.prompt_ids) == FRAME[-10:]
    assert BYTES.decode(encoded.response_ids) == "so.<|im_end|>"
    assert encoded.is_truncated and not encoded.is_response_cut


def test_a_response_is_cut_when_one_token_of_the_prompt_is_left_and_has_no_end_then():
    encoded = encode_response(BYTES, PROMPT, "a long answer", max_tokens=9)
    assert BYTES.decode(encoded.prompt_ids) == "\n"
    assert BYTES.decode(encoded.response_ids) == "a long a"
    assert encoded.is_truncated and encoded.is_response_cut
    assert END not in encoded.response_ids


def test_all_responses_stand_behind_the_prompt_that_leaves_room_for_the_longest():
    long, short = encode_responses(BYTES, PROMPT, ["a long answer", "so."], max_tokens=20)
    assert long.prompt_ids.tolist() == short.prompt_ids.tolist()
    assert BYTES.decode(long.prompt_ids) == FRAME[-6:]
    assert BYTES.decode(short.response_ids) == "so.<|im_end|>"
    assert long.is_truncated and short.is_truncated and not long.is_response_cut
    long, short = encode_responses(BYTES, PROMPT, ["a long answer", "so."], max_tokens=9)
    assert long.is_response_cut and not short.is_response_cut
    assert long.prompt_ids.tolist() == short.prompt_ids.tolist() == BYTES.encode("\n")


def test_a_response_that_just_fits_is_whole():
    encoded = encode_response(BYTES, PROMPT, "so.", max_tokens=PROMPT_LENGTH + 4)
    assert not encoded.is_truncated and len(encoded.prompt_ids) == PROMPT_LENGTH
    cut = encode_response(BYTES, PROMPT, "so.", max_tokens=PROMPT_LENGTH + 3)
    assert cut.is_truncated and len(cut.prompt_ids) == PROMPT_LENGTH - 1


def test_without_a_prompt_a_response_stands_behind_the_token_that_begins_texts():
    assert encode_response(BYTES, (), "so.", max_tokens=100).prompt_ids.tolist() == [END]
    beginning = byte_tokenizer()
    beginning.bos_token = "<|im_start|>"
    assert encode_response(beginning, (), "so.", max_tokens=100).prompt_ids.tolist() == [beginning.bos_token_id]


def test_a_base_model_reads_the_turns_texts():
    turns = (*PROMPT, {"role": "assistant", "content": "so."}, {"role": "user", "content": "and?"})
    encoded = encode_response(without("chat_template"), turns, "x", max_tokens=100)
    assert BYTES.decode(encoded.prompt_ids) == "why?\n\nso.\n\nand?"


@pytest.mark.parametrize(("messages", "ends"), [(PROMPT, True), ((), True), ((), False)])
def test_a_tokenizer_without_an_end_is_refused(messages, ends):
    with pytest.raises(ValueError, match="no end-of-sequence token, so a response could never end; add one"):
        encode_response(without("eos_token"), messages, "so.", max_tokens=100, ends=ends)


@given(st.text(max_size=20), st.text(max_size=20), st.integers(8, 60))
def test_what_is_left_is_the_end_of_the_prompt_and_the_beginning_of_the_response(prefix, response, max_tokens):
    whole = encode_response(BYTES, PROMPT, response, max_tokens=10_000, prefix=prefix)
    encoded = encode_response(BYTES, PROMPT, response, max_tokens=max_tokens, prefix=prefix)
    prompt, own = whole.prompt_ids.tolist(), whole.response_ids.tolist()
    kept, kept_own = encoded.prompt_ids.tolist(), encoded.response_ids.tolist()
    assert kept and prompt[-len(kept) :] == kept
    assert kept_own and own[: len(kept_own)] == kept_own
    assert len(kept) + len(kept_own) == min(max_tokens, len(prompt) + len(own))
    assert encoded.is_truncated == (len(kept) + len(kept_own) < len(prompt) + len(own))
    assert encoded.is_response_cut == (len(kept_own) < len(own))
    assert encoded.is_response_cut <= (len(kept) == 1)
