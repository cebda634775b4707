"""Models that lack or name something otherwise than most: a pad token, the final norm, the first position."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from raylhf.config.reward_model import ScalarHead, TokenHead
from raylhf.config.run import RewardModelRunConfig
from raylhf.driver.roles import prepare_offline
from raylhf.models.calibration import Calibration, template_hash, tokenizer_hash
from raylhf.models.load import load_tokenizer, max_positions
from raylhf.models.reward import build_reward_model, export_reward_model, load_reward_model
from raylhf.models.tiny import tiny_model


def build(folder, head=None, *, trainable_layers=None) -> Any:
    return build_reward_model(
        folder,
        head=head or ScalarHead(),
        dtype=torch.float32,
        attention="sdpa",
        trust_remote_code=False,
        seed=3,
        lora=None,
        trainable_layers=trainable_layers,
    )


def write_with_one_special_token(folder, *, num_embeddings):
    """A tiny decoder over 256 bytes and EOS, as GPT-2: bos, eos and unk are one token, and pad is none."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end).save_pretrained(folder)
    tiny_model(vocab_size=num_embeddings, seed=0, eos_token_id=256).save_pretrained(folder)
    return str(folder)


def test_a_pad_token_is_added_where_eos_is_the_only_special_token(tmp_path):
    source, folder = write_with_one_special_token(tmp_path / "in", num_embeddings=258), str(tmp_path / "out")
    model, tokenizer = build(source), load_tokenizer(source)
    calibration = Calibration(
        n=1,
        mean=(0.0,),
        std=(1.0,),
        q01=(0.0,),
        q99=(0.0,),
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer),
    )
    state = {name: p.detach() for name, p in model.hf.named_parameters()}
    export_reward_model(model, folder, state=state, tokenizer=tokenizer, calibration=calibration)
    saved = AutoTokenizer.from_pretrained(folder)
    assert (saved.pad_token, saved.pad_token_id, saved.eos_token_id) == ("<|pad|>", 257, 256)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    tokens, lengths = torch.tensor([[5, 6, 256], [7, 256, 257]]), torch.tensor([3, 2])
    torch.testing.assert_close(plain(tokens).logits, model(tokens, lengths))
    written = load_reward_model(folder, dtype=torch.float32).calibration
    assert written is not None
    written.check_text_format(saved, folder)


def test_a_model_without_room_for_a_pad_token_is_refused_before_training(tmp_path):
    source = write_with_one_special_token(tmp_path, num_embeddings=257)
    with pytest.raises(ValueError, match=r"vocabulary of 257 has no free place for a pad token"):
        build(source)
    assert build(source, TokenHead(kind="token")).is_token_level  # read at every token, whatever the padding


def test_the_final_norm_of_modernbert_is_trained_with_the_head(tmp_path):
    config = ModernBertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )
    ModernBertModel(config).save_pretrained(tmp_path)
    model = build(str(tmp_path), trainable_layers=0)
    trained = {name for name, p in model.hf.named_parameters() if p.requires_grad and name.startswith("model.")}
    assert trained == {"model.final_norm.weight"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (BertConfig(max_position_embeddings=512), 512),
        (GPT2Config(n_positions=1024), 1024),
        (T5Config(), None),
    ],
)
def test_the_positions_of_robertas_kind_begin_after_the_pad_token(config, expected):
    assert max_positions(config) == expected


def test_texts_longer_than_robertas_context_are_refused_before_anything_starts(tmp_path):
    RobertaConfig(max_position_embeddings=34, pad_token_id=1).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")  # the check of lengths reads no weights, but asks for their file

    def prepare(max_tokens):
        raw = {
            "name": "x",
            "model": {"path": str(tmp_path)},
            "data": {"path": "p", "kind": "pairs", "max_tokens": max_tokens},
            "objective": {"kind": "reward_model", "loss": {"kind": "bradley_terry"}},
        }
        return prepare_offline(RewardModelRunConfig.model_validate(raw))[0]

    assert prepare(32) == str(tmp_path)
    with pytest.raises(ValueError, match="data.max_tokens = 33, but the context of .* is 32 tokens"):
        prepare(33)
