"""Several rows on one line: what is where, and that each has the numbers that it has alone."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_stand_ins import RESPONSES, make_preference_config
from reward_stand_ins import on_ranks, write_rows
from transformers import AutoModelForCausalLM, MistralConfig, OPTConfig, Qwen3Config

from raylhf.learner.microbatch import Layout, cut_further, make_micro_batch, plan_micro_batches, sizes_of
from raylhf.models import packing
from raylhf.models.load import load_causal_lm
from raylhf.models.packing import SEGMENT_ATTENTION, require_packable, segment_attention
from raylhf.models.policy import PolicyModel, load_critic, load_policy
from raylhf.models.tiny import byte_tokenizer, write_tiny_model

CPU = torch.device("cpu")


class Rows:
    """Prompts and responses of given lengths; equal prompt lengths are equal prompts."""

    def __init__(self, *lengths: tuple[int, int]) -> None:
        rng = torch.Generator().manual_seed(0)
        prompts = {size: torch.randint(5, 250, (size,), generator=rng).numpy() for size, _ in lengths}
        self.prompt_ids = [prompts[size] for size, _ in lengths]
        self.response_ids = [torch.randint(5, 250, (size,), generator=rng).numpy() for _, size in lengths]


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12)), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 30), st.booleans(), st.booleans())
def test_every_row_is_in_one_micro_batch_that_holds_it(lengths, max_tokens, is_packed, shares_prompts):
    layout, rows = Layout(max_tokens, is_packed, shares_prompts), Rows(*lengths)
    parts = plan_micro_batches(sizes_of(rows), range(len(lengths)), layout)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        tokens = make_micro_batch(rows, part, CPU, layout).tokens
        assert len(part) == 1 or tokens.numel() <= max_tokens
        assert tokens.numel() == layout.num_positions(sizes_of(rows), part)


@given(LENGTHS, st.integers(1, 14))
def test_fewer_micro_batches_than_another_rank_has_are_cut_further(lengths, count):
    parts = plan_micro_batches(sizes_of(Rows(*lengths)), range(len(lengths)), Layout(20))
    further = cut_further(parts, count)
    assert sorted(row for part in further for row in part) == list(range(len(lengths)))
    assert len(further) == max(len(parts), min(count, len(lengths))) and all(further)


def test_a_line_holds_rows_one_after_the_other():
    rows = Rows((2, 3), (1, 2), (3, 4))
    batch = make_micro_batch(rows, [0, 1, 2], CPU, Layout(100))
    assert batch.position_ids is not None and batch.segments is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]
    assert batch.segments.query_ends.tolist() == batch.segments.key_ends.tolist() == [0, 5, 8, 15]
    assert batch.segments.key_positions is None
    assert batch.ends.tolist() == [4, 7, 14]
    assert batch.tokens[batch.lines, batch.positions + 1].tolist() == batch.targets.tolist()


def test_responses_to_one_prompt_follow_a_single_copy_of_it():
    rows = Rows((2, 3), (3, 1), (2, 2))
    batch = make_micro_batch(rows, [0, 1, 2], CPU, Layout(100))
    assert batch.position_ids is not None and batch.segments is not None
    # Prompt 0, its responses 0 and 2, then prompt and response 1.
    expected = [*rows.prompt_ids[0], *rows.response_ids[0], *rows.response_ids[2], *rows.prompt_ids[1]]
    assert batch.tokens[0].tolist() == [*expected, *rows.response_ids[1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3]]
    assert batch.positions.tolist() == [1, 2, 3, 9, 1, 5]  # the first token of both responses follows the prompt's last
    assert batch.ends.tolist() == [4, 10, 6]
    assert batch.segments.query_ends.tolist() == [0, 2, 5, 7, 11]
    assert batch.segments.key_ends.tolist() == [0, 2, 7, 11, 15]
    assert batch.segments.key_positions is not None
    assert batch.segments.key_positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("packing") / "tiny")


def write_windowed(folder: Any, *, sliding_window: int = 4) -> str:
    """A model whose tokens see but the last few."""
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        vocab_size=259,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=sliding_window,
    )
    return write_loaded(folder, config)


LOADING = {"dtype": torch.float32, "trust_remote_code": False}
ROWS = Rows((5, 7), (9, 3), (5, 2), (11, 1), (1, 13), (5, 4))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "windowed"])
@pytest.mark.parametrize(("attention", "shares_prompts"), [(SEGMENT_ATTENTION, True), ("sdpa", False)])
def test_packed_rows_have_the_numbers_and_gradients_of_rows_apart(
    folder, tmp_path, kind, attention, shares_prompts, is_checkpointed
):
    model = folder if kind == "tiny" else write_windowed(tmp_path)
    layouts = Layout(100, shares_prompts=shares_prompts), Layout(100, is_packed=False)
    found, expected = ([], [])
    for layout, numbers in zip(layouts, (found, expected), strict=True):
        used = attention if layout.is_packed else "eager"
        policy = load_policy(model, attention=used, logprob_chunk=4, with_value_head=False, **LOADING)
        critic = load_critic(model, attention=used, **LOADING)
        if is_checkpointed:
            policy.train()
            policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.nn.init.constant_(critic.value_head.linear.weight, 0.1)
        batch = make_micro_batch(ROWS, range(6), CPU, layout)
        assert len(batch.tokens) == (1 if layout.is_packed else 6)
        line = {"position_ids": batch.position_ids, "segments": batch.segments}
        where = batch.tokens, batch.lines, batch.positions
        logprobs, entropies, _ = policy(*where, batch.targets, temperature=0.7, **line)
        values = critic(*where, **line)
        numbers.extend(batch.scatter(flat, 13) for flat in (logprobs, entropies, values))
        numbers.append(critic(batch.tokens, batch.row_lines, batch.ends, **line))
        (numbers[0] * torch.arange(6)[:, None]).sum().backward()
        numbers.extend(parameter.grad for parameter in policy.parameters())
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_layers_that_segments_do_not_know_are_refused():
    require_packable(Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]))
    config = Qwen3Config(num_hidden_layers=1)
    config.layer_types = ["chunked_attention"]
    with pytest.raises(ValueError, match=r"'qwen3' has layers of chunked_attention.*set learner.packing: false"):
        require_packable(config)


def write_loaded(folder: Any, config: Any) -> str:
    """A model of this shape with a tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_dropout_is_off_wherever_a_layer_keeps_it(tmp_path):
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 259,
    }
    folder = write_loaded(tmp_path, OPTConfig(word_embed_proj_dim=32, dropout=0.5, layerdrop=0.2, **shape))
    model = load_causal_lm(folder, dtype=torch.float32, attention="sdpa", trust_remote_code=False).train()
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_attention_that_changes_its_scores_otherwise_is_refused():
    module: Any = torch.nn.Module()
    module.config = Qwen3Config()
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"'qwen3' changes its attention's scores by s_aux.*learner.packing: false"):
        segment_attention(module, states, states, states, None, s_aux=torch.zeros(2))


def across_rows(
    self: PolicyModel, tokens: Any, lines: Any, positions: Any, position_ids: Any = None, segments: Any = None
) -> torch.Tensor:
    """A model that does not know where a packed row begins."""
    return self.lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[lines, positions]


def refusal(ranks, config):
    """What starting the learner says."""
    PolicyModel.hidden = across_rows  # in this process, which ends with the test
    try:
        ranks.start(config)
    except ValueError as error:
        return str(error)
    return ""


def sft_config(folder: str, tmp_path: Any, **data: Any) -> Any:
    path = write_rows(tmp_path / "responses.jsonl", list(RESPONSES))
    return make_preference_config(folder, path, data={"kind": "responses", **data}, objective={"kind": "sft"})


def test_a_model_whose_rows_see_each_other_is_refused(folder, tmp_path):
    (said,) = on_ranks(refusal, 1, sft_config(folder, tmp_path))
    assert said.startswith("learner.packing: sequences that share a line")
    assert said.endswith("set learner.packing: false")


def refusal_without_windows(ranks, config):
    """What starting the learner says where the attention is not told how far back its layers look."""
    packing.AttentionInterface.register(
        SEGMENT_ATTENTION, lambda *args, sliding_window=None, **kwargs: segment_attention(*args, **kwargs)
    )
    try:
        ranks.start(config)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("max_tokens", "is_refused"), [(64, True), (8, False)])
def test_a_window_that_packing_would_lose_is_found_where_rows_are_longer(tmp_path, max_tokens, is_refused):
    folder = write_windowed(tmp_path / "windowed", sliding_window=16)
    (said,) = on_ranks(refusal_without_windows, 1, sft_config(folder, tmp_path, max_tokens=max_tokens))
    assert said.startswith("learner.packing: sequences that share a line") is is_refused
    assert bool(said) is is_refused
