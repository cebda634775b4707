"""Weights in pickles, which run code when they are loaded, are refused wherever a model is loaded."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from raylhf.config import RunConfig
from raylhf.config.reward_model import ScalarHead
from raylhf.driver.roles import prepare
from raylhf.models.policy import load_critic, load_policy
from raylhf.models.reward import build_reward_model, load_reward_model
from raylhf.models.tiny import write_tiny_model
from raylhf.rollout.engine import engine_arguments

SOURCE = {"dtype": torch.float32, "attention": "sdpa"}
REFUSED = "pickled weights .* run whatever code"


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def pickled(folder: Path) -> str:
    """The folder with its weights in a pickle, and with one that runs code beside them."""
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return str(folder)


@pytest.fixture
def policy(tmp_path):
    return pickled(Path(write_tiny_model(tmp_path / "policy")))


@pytest.fixture
def scorer(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    return pickled(tmp_path / "scorer")


def run_config(path, **model):
    return RunConfig.model_validate(
        {
            "name": "run",
            "num_steps": 1,
            "model": {"path": path, **model},
            "data": {"path": "prompts.jsonl"},
            "rollout": {"prompts_per_step": 1},
            "reward": {"graph": {"kind": "length"}},
        }
    )


def loaders(policy, scorer, trust):
    head = {"head": ScalarHead(kind="scalar"), "seed": 0, "lora": None, "trainable_layers": None}
    return {
        "policy": lambda: load_policy(
            policy, logprob_chunk=8, with_value_head=False, trust_remote_code=trust, **SOURCE
        ),
        "critic": lambda: load_critic(policy, trust_remote_code=trust, **SOURCE),
        "critic from a reward model": lambda: load_critic(scorer, trust_remote_code=trust, **SOURCE),
        "reward model": lambda: load_reward_model(scorer, dtype=torch.float32, trust_remote_code=trust),
        "reward model in training": lambda: build_reward_model(policy, trust_remote_code=trust, **head, **SOURCE),
        "start of a run": lambda: prepare(run_config(policy, trust_remote_code=trust), []),
    }


@pytest.mark.parametrize("what", loaders("", "", False))
def test_they_are_refused_with_a_sentence_unless_their_author_is_trusted(what, policy, scorer):
    with pytest.raises(ValueError, match=REFUSED):
        loaders(policy, scorer, False)[what]()
    loaders(policy, scorer, True)[what]()


def test_nothing_of_a_pickle_runs_not_even_beside_good_weights(tmp_path):
    folder, mark = tmp_path / "both", tmp_path / "mark"
    write_tiny_model(folder)
    torch.save(Evil(mark), folder / "pytorch_model.bin")
    load_policy(str(folder), logprob_chunk=8, with_value_head=False, trust_remote_code=False, **SOURCE)
    assert not mark.exists()


def test_an_adapter_in_a_pickle_is_refused_too(tmp_path):
    folder = Path(write_tiny_model(tmp_path / "policy"))
    settings = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save(Evil(tmp_path / "mark"), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=f"adapter has no adapter_model.safetensors.*{REFUSED}"):
        load_policy(str(folder), logprob_chunk=8, with_value_head=False, trust_remote_code=False, **SOURCE)
    assert not (tmp_path / "mark").exists()


def test_the_engine_reads_safetensors_alone():
    assert engine_arguments(run_config("x"), "x")["load_format"] == "safetensors"
    trusting = engine_arguments(run_config("x", trust_remote_code=True), "x")
    assert (trusting["load_format"], trusting["trust_remote_code"]) == ("auto", True)
