"""What a reward model reads, and which of its tokens hold which characters of the response."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer

from raylhf.models.reward_text import encode_judged, encode_prompt_alone
from raylhf.models.tiny import byte_tokenizer

PROMPT = ({"role": "user", "content": "why?"},)
BYTES = byte_tokenizer()


def without_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def word_pieces():
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "answer", "why", "##s", ".", "?")
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.enable_truncation(4)  # as sentence-transformers' tokenizer.json asks for
    core.enable_padding(length=8)
    return BertTokenizer(tokenizer_object=core)


def text_of(response, span):
    return response[span[0] : span[1]]


def test_a_chat_template_frames_the_response_as_the_assistants_turn():
    encoded = encode_judged(BYTES, PROMPT, "so.", max_tokens=100)
    expected = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nso.<|im_end|>\n"
    assert BYTES.decode(encoded.ids) == expected
    assert [tuple(span) for span in encoded.spans[encoded.in_response]] == [(0, 1), (1, 2), (2, 3)]
    assert not encoded.is_truncated and encoded.ids.dtype == encoded.spans.dtype == np.int64


def test_a_response_that_repeats_the_templates_words_is_found_where_it_stands():
    encoded = encode_judged(BYTES, PROMPT, "assistant\n", max_tokens=100)
    inside = np.flatnonzero(encoded.in_response)
    assert BYTES.decode(encoded.ids[inside]) == "assistant\n"
    assert BYTES.decode(encoded.ids[inside[-1] + 1 :]) == "<|im_end|>\n"


def test_spans_speak_about_the_original_response_where_the_template_strips_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}"
    encoded = encode_judged(tokenizer, PROMPT, "  ab ", max_tokens=100)
    assert tokenizer.decode(encoded.ids) == "[why?][ab]"
    assert [tuple(s) for s in encoded.spans[encoded.in_response]] == [(2, 3), (3, 4)]


def test_a_template_that_leaves_out_thoughts_keeps_the_rest_in_place():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'].split('</t>')[-1] }}]{% endfor %}"
    encoded = encode_judged(tokenizer, PROMPT, "hm</t>ok", max_tokens=100)
    assert tokenizer.decode(encoded.ids) == "[why?][ok]"
    assert [tuple(s) for s in encoded.spans[encoded.in_response]] == [(6, 7), (7, 8)]


def test_a_response_without_a_prompt_is_a_turn_alone_or_plain_text():
    assert BYTES.decode(encode_judged(BYTES, (), "so", max_tokens=99).ids) == "<|im_start|>assistant\nso<|im_end|>\n"
    strict = byte_tokenizer()
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    assert strict.decode(encode_judged(strict, (), "so", max_tokens=99).ids) == "so<|im_end|>"
    with pytest.raises(ValueError, match="refuses the conversation: user first"):
        encode_judged(strict, ({"role": "system", "content": "s"},), "so", max_tokens=99)


def test_without_a_template_prompt_and_response_are_joined_and_ended():
    encoded = encode_judged(without_template(), PROMPT, "so", max_tokens=100)
    assert BYTES.decode(encoded.ids) == "why?\n\nso<|im_end|>"
    assert [tuple(s) for s in encoded.spans] == [(-1, -1)] * 6 + [(0, 1), (1, 2), (-1, -1)]


def test_an_encoder_reads_a_pair_or_the_response_alone():
    tokenizer = word_pieces()
    encoded = encode_judged(tokenizer, PROMPT, "Good  answers", max_tokens=100)
    assert tokenizer.convert_ids_to_tokens(encoded.ids.tolist()) == [
        "[CLS]", "why", "?", "[SEP]", "good", "answer", "##s", "[SEP]",
    ]  # fmt: skip
    assert [text_of("Good  answers", s) for s in encoded.spans[4:7]] == ["Good", "answer", "s"]
    assert encoded.in_response.tolist() == [False] * 4 + [True] * 3 + [False]
    alone = encode_judged(tokenizer, (), "bad", max_tokens=100)
    assert alone.ids.tolist() == [2, 6, 3] and alone.spans.tolist() == [[-1, -1], [0, 3], [-1, -1]]


def test_the_prompts_beginning_goes_first_then_the_responses_end_and_the_frame_stays():
    tokenizer = word_pieces()
    shorter = encode_judged(tokenizer, PROMPT, "good answers .", max_tokens=8)
    assert shorter.is_truncated
    assert shorter.ids.tolist() == [2, 11, 3, 5, 7, 9, 10, 3]
    shortest = encode_judged(tokenizer, PROMPT, "good answers .", max_tokens=5)
    assert shortest.ids.tolist() == [2, 3, 5, 7, 3]
    chat = encode_judged(BYTES, PROMPT, "abcdef", max_tokens=8)
    assert BYTES.decode(chat.ids) == "abcdef<|im_end|>\n"
    assert BYTES.decode(encode_judged(BYTES, PROMPT, "abcdefgh", max_tokens=8).ids) == "abcdef<|im_end|>\n"


def test_the_assistants_header_stays_while_it_leaves_half_of_the_tokens_to_the_response():
    header = "<|im_end|>\n<|im_start|>assistant\n"
    cut = encode_judged(BYTES, PROMPT, "x" * 50, max_tokens=30)
    assert BYTES.decode(cut.ids) == header + "x" * 15 + "<|im_end|>\n"  # 13 tokens, 15 and 2
    shortened = encode_judged(BYTES, PROMPT, "so.", max_tokens=21)
    assert BYTES.decode(shortened.ids) == "hy?" + header + "so.<|im_end|>\n"
    assert "assistant" not in BYTES.decode(encode_judged(BYTES, PROMPT, "x" * 50, max_tokens=25).ids)
    plain = encode_judged(without_template(), PROMPT, "x" * 50, max_tokens=8)
    assert BYTES.decode(plain.ids) == "\n\nxxxxx<|im_end|>"


def test_a_rendered_beginning_of_sequence_token_is_not_cut():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    judged = encode_judged(tokenizer, PROMPT, "so", max_tokens=8)
    assert tokenizer.decode(judged.ids) == "<|pad|>y?][so]"
    assert tokenizer.decode(encode_prompt_alone(tokenizer, PROMPT, max_tokens=4).ids) == "<|pad|>y?]"


def test_a_template_that_rewrites_the_prompt_has_no_header_to_keep():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] | replace('why', 'how') }}]{% endfor %}"
    assert tokenizer.decode(encode_judged(tokenizer, PROMPT, "so", max_tokens=4).ids) == "[so]"


def test_a_last_step_that_ends_in_white_space_keeps_its_token_where_only_the_prompt_is_cut():
    tokenizer = word_pieces()
    ends = np.array([6, 14])
    cut = encode_judged(tokenizer, PROMPT, "good. answer\n ", max_tokens=7)
    assert cut.is_truncated and not cut.is_response_cut
    assert tokenizer.convert_ids_to_tokens(cut.ids.tolist()) == ["[CLS]", "?", "[SEP]", "good", ".", "answer", "[SEP]"]
    assert cut.tokens_at(ends).tolist() == [4, 5]
    shorter = encode_judged(tokenizer, PROMPT, "good. answer\n ", max_tokens=5)
    assert shorter.is_response_cut and shorter.tokens_at(ends).tolist() == [-1, -1]


def test_steps_are_read_at_the_token_that_completes_them():
    encoded = encode_judged(BYTES, PROMPT, "a\u00e9 b", max_tokens=100)
    inside = np.flatnonzero(encoded.in_response)
    assert encoded.tokens_at(np.array([1, 2, 4])).tolist() == [inside[0], inside[2], inside[-1]]
    cut = encode_judged(BYTES, PROMPT, "abcdefgh", max_tokens=8)
    assert cut.tokens_at(np.array([6, 7])).tolist() == [5, -1]


def test_a_prompt_alone_is_encoded_for_a_classifier():
    assert BYTES.decode(encode_prompt_alone(BYTES, PROMPT, max_tokens=99).ids) == "<|im_start|>user\nwhy?<|im_end|>\n"
    assert encode_prompt_alone(word_pieces(), PROMPT, max_tokens=3).ids.tolist() == [2, 11, 3]


def test_a_slow_tokenizer_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="SlowTokenizer is a slow one without character offsets"):
        encode_judged(SlowTokenizer(), PROMPT, "so", max_tokens=99)  # type: ignore[arg-type]


@given(st.text(max_size=12), st.booleans(), st.integers(min_value=16, max_value=90))
def test_the_spans_of_any_response_hold_its_characters_in_order(response, is_chat, max_tokens):
    tokenizer = BYTES if is_chat else without_template()
    encoded = encode_judged(tokenizer, PROMPT, response, max_tokens=max_tokens)
    assert len(encoded.ids) == len(encoded.spans) <= max_tokens
    spans = encoded.spans[encoded.in_response]
    assert (np.diff(spans[:, 1]) >= 0).all() and (spans[:, 1] > spans[:, 0]).all()
    if not encoded.is_truncated:
        assert sorted({i for s in spans for i in range(*s)}) == list(range(len(response)))
        assert tokenizer.decode(encoded.ids[encoded.in_response]) == response
