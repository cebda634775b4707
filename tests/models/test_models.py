"""Loading, heads, adapters and the tiny model, against transformers itself."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from raylhf.models.adapters import adapters_off, add_lora, lora_layers, merged_weight
from raylhf.models.chat import encode_prompt
from raylhf.models.load import load_tokenizer, prepare_model, stop_token_ids
from raylhf.models.policy import load_critic, load_policy
from raylhf.models.tiny import byte_tokenizer, tiny_model, write_tiny_model

SOURCE = {"dtype": torch.float32, "attention": "sdpa", "trust_remote_code": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def adapter_weight(layer: Any) -> torch.Tensor:
    """The B of an adapter, which starts at zero."""
    return layer.lora_B["raylhf"].weight


def small_reward_model_config(*, num_outputs: int) -> LlamaConfig:
    """One layer; padding is token 0."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = num_outputs
    config.pad_token_id = 0
    return config


def rows_and_positions(prompt_length, response_length):
    """The states before each response token of one row."""
    positions = torch.arange(prompt_length - 1, prompt_length + response_length - 1)
    return torch.zeros_like(positions), positions


def test_the_policys_logprobs_are_those_of_the_tempered_model_and_padding_changes_nothing(folder):
    policy = load_policy(folder, logprob_chunk=3, with_value_head=False, **SOURCE)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    rows, positions = rows_and_positions(3, 4)
    logprobs, entropies, values = policy(tokens, rows, positions, tokens[0, 3:], temperature=0.5)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[0, 2:6] / 0.5
    expected = full.log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(1, tokens[0, 3:, None])[:, 0])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1))
    assert values is None
    padded = torch.cat([tokens, torch.full((1, 5), 77)], dim=1)
    again, _, _ = policy(padded, rows, positions, tokens[0, 3:], temperature=0.5)
    torch.testing.assert_close(again, logprobs)


def test_a_new_value_head_says_zero_and_sends_no_gradient_into_the_trunk(folder):
    policy = load_policy(folder, logprob_chunk=8, with_value_head=True, **SOURCE)
    tokens = torch.tensor([[5, 6, 7, 8]])
    rows, positions = rows_and_positions(2, 2)
    _, _, values = policy(tokens, rows, positions, tokens[0, 2:], temperature=1.0)
    assert values is not None and values.tolist() == [0, 0]
    (values - 1).square().sum().backward()
    assert policy.value_head is not None
    assert policy.value_head.linear.bias.grad == torch.tensor([-4.0])
    assert all(p.grad is None for p in policy.lm.parameters())


def test_a_critic_from_a_reward_model_starts_with_its_scores(tmp_path):
    config = small_reward_model_config(num_outputs=1)
    reward_model = LlamaForSequenceClassification(config)
    reward_model.save_pretrained(tmp_path)
    tokens = torch.tensor([[3, 4, 5]])
    critic = load_critic(str(tmp_path), **SOURCE)
    value = critic(tokens, torch.tensor([0]), torch.tensor([2]))
    torch.testing.assert_close(value, reward_model(tokens).logits[0])


def test_a_critic_from_a_reward_model_with_two_outputs_is_refused(tmp_path):
    config = small_reward_model_config(num_outputs=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 outputs"):
        load_critic(str(tmp_path), **SOURCE)


def test_adapters_can_be_switched_off_and_merged():
    model = tiny_model(vocab_size=32, seed=0)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(tokens).logits
        add_lora(model, rank=4, alpha=8, target_modules="all-linear", seed=0)
        torch.testing.assert_close(model(tokens).logits, before)  # B starts at zero
        layers = lora_layers(model)
        assert not any("lm_head" in name for name in layers)
        for layer in layers.values():
            torch.nn.init.normal_(adapter_weight(layer))
        adapted = model(tokens).logits
        assert (adapted - before).abs().max() > 0.1
        with adapters_off(model):
            torch.testing.assert_close(model(tokens).logits, before)
        torch.testing.assert_close(model(tokens).logits, adapted)
        plain = tiny_model(vocab_size=32, seed=0)
        for name, layer in layers.items():
            weight = plain.get_parameter(f"{name}.weight")
            weight.copy_(merged_weight(layer, weight))
        torch.testing.assert_close(plain(tokens).logits, adapted, rtol=1e-4, atol=1e-4)


def test_the_chat_template_is_applied_once_and_ends_where_the_answer_starts(folder):
    tokenizer = load_tokenizer(folder)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hé"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHé<|im_end|>\n<|im_start|>assistant\n"


def test_a_model_without_a_chat_template_gets_the_plain_turns():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == "Be brief.\n\nHi"


def test_every_stop_token_of_the_generation_config_counts(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    assert stop_token_ids(str(tmp_path), load_tokenizer(folder)) == (7, 9, 258)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/nowhere/model", "does not exist"),
        ("package:no_such_package", "no installed package"),
        ("package:json", "ships no .gguf file"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_a_sentence(path, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare_model(path, seed=0)


def test_a_folder_that_is_no_model_is_told_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"without config.json"):
        prepare_model(str(tmp_path), seed=0)


def test_logits_that_a_model_caps_are_refused(tmp_path):
    model = tiny_model(vocab_size=32, seed=0)
    model.config.final_logit_softcapping = 30.0
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_policy(str(tmp_path), logprob_chunk=8, with_value_head=False, **SOURCE)
