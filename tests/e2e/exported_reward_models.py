"""Tiny reward models of every kind, and what scores they must give, computed by transformers alone."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from untrained_reward_models import write_reward_model

from raylhf.config.reward_model import EnsembleHead, MultiValueHead, RewardHead, ScalarHead, TokenHead

ATTRIBUTES = ("kindness", "substance")
HEADS: dict[str, RewardHead] = {
    "scalar": ScalarHead(),
    "token": TokenHead(kind="token"),
    "process": TokenHead(kind="token"),
    "multi_value": MultiValueHead(kind="multi_value", attributes=ATTRIBUTES),
    "ensemble": EnsembleHead(kind="ensemble", members=3),
}
MEAN, STD, Q01, Q99 = -99.0, 10.0, 0.9, 1.0
"""A calibration that shows: outputs are between 0.8 and 1.1, and become 9.99 to 10."""


def write_each_kind(base: str, place: Path) -> dict[str, str]:
    """The folder of a reward model on the language model in `base` with each of HEADS; nothing is trained."""
    return {
        kind: write_reward_model(
            base, place / kind, head, [(MEAN, STD, Q01, Q99)], aggregate="steps" if kind == "process" else "mean"
        )
        for kind, head in HEADS.items()
    }


class Oracle:
    """What a reward model's folder must say of a sampled response: transformers on the rendered conversation."""

    def __init__(self, folder: str, system_prompt: str):
        self._folder = folder
        self._system_prompt = system_prompt
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def outputs(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Outputs [B, K] of a sequence classifier."""
        model = AutoModelForSequenceClassification.from_pretrained(self._folder).eval()
        with torch.no_grad():
            return torch.stack([model(self._tokens(row)[0]).logits[0] for row in rows])

    def token_outputs(self, rows: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Outputs [T_i] of a token classifier on the tokens of each response's text."""
        model = AutoModelForTokenClassification.from_pretrained(self._folder).eval()
        found = []
        with torch.no_grad():
            for row in rows:
                tokens, in_response = self._tokens(row)
                found.append(model(tokens).logits[0, in_response, 0])
        return found

    def logprobs(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Log-probability [B] that a language model gives each response, with the end token where it has one."""
        model = AutoModelForCausalLM.from_pretrained(self._folder).eval()
        sums = []
        with torch.no_grad():
            for row in rows:
                tokens, in_response = self._tokens(row)
                if row["finish_reason"] == "stop":
                    in_response[in_response.nonzero().max() + 1] = True
                chosen = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
                sums.append(chosen[in_response[1:]].sum())
        return torch.stack(sums)

    def _tokens(self, row: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The conversation's tokens [1, L], and which of them are the response's [L]."""
        turns = [{"role": "system", "content": self._system_prompt}, {"role": "user", "content": row["prompt"]}]
        before = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": row["response"]})
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
        starts = encoded["offset_mapping"][0, :, 0]
        in_response = (starts >= len(before)) & (starts < len(before) + len(row["response"]))
        return encoded["input_ids"], in_response


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
