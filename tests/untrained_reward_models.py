"""Folders of reward models whose heads are as they were drawn, with a given calibration."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from raylhf.config.learner import LoRAConfig
from raylhf.config.reward_model import RewardHead
from raylhf.models.calibration import Calibration, template_hash, tokenizer_hash
from raylhf.models.load import load_tokenizer
from raylhf.models.reward import build_reward_model, export_reward_model
from raylhf.models.reward_model import Aggregate

Statistics = Sequence[tuple[float, float, float, float]]
"""Mean, standard deviation, 1 % and 99 % quantile of each output; from the first one again where there are more."""


def write_reward_model(
    base: str,
    folder: Path,
    head: RewardHead,
    statistics: Statistics,
    *,
    lora: LoRAConfig | None = None,
    aggregate: Aggregate = "mean",
) -> str:
    """A reward model on the language model in `base` with a new head; nothing is trained."""
    model = build_reward_model(
        base,
        head=head,
        dtype=torch.float32,
        attention="sdpa",
        trust_remote_code=False,
        seed=3,
        lora=lora,
        trainable_layers=None,
        aggregate=aggregate,
    )
    tokenizer = load_tokenizer(base)
    calibration = calibration_of(tokenizer, len(model.names), statistics)
    state = {name: weight.detach() for name, weight in model.hf.named_parameters()}
    export_reward_model(model, str(folder), state=state, tokenizer=tokenizer, calibration=calibration)
    return str(folder)


def calibration_of(tokenizer: PreTrainedTokenizerBase, num_outputs: int, statistics: Statistics) -> Calibration:
    """The calibration of a model with so many outputs."""
    mean, std, q01, q99 = zip(*(statistics[k % len(statistics)] for k in range(num_outputs)), strict=True)
    return Calibration(
        n=2,
        mean=mean,
        std=std,
        q01=q01,
        q99=q99,
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer),
    )
