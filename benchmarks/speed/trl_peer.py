"""TRL's side of one run; in TRL's environment, without anything of raylhf. Reads a JSON file, writes another.

    python trl_peer.py SPEC.json

The times are those between ends of steps, with all that belongs to a step.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def characters(completions: list[Any], **_: Any) -> list[float]:
    """The share of each response's characters that are vowels or spaces."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(c in "aeiou " for c in text) / max(len(text), 1) for text in texts]


class Stopwatch(TrainerCallback):
    """When steps end, and how long parts of them take."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.parts: dict[str, float] = defaultdict(float)
        self.tokens = 0
        self.response_tokens = 0
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.time()
        row = {"seconds": now - self._last, "end": now, "tokens": self.tokens, "response_tokens": self.response_tokens}
        self.steps.append(row | {f"{name}_s": value for name, value in self.parts.items()})
        self._last, self.tokens, self.response_tokens = now, 0, 0
        self.parts.clear()
        print(f"step {len(self.steps)}: {self.steps[-1]}", flush=True)

    def time(self, owner: Any, method: str, part: str) -> None:
        """Add the time of `owner.method` to a part."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - began

        setattr(owner, method, timed)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    watch = Stopwatch()
    trainer = (online if spec["method"] in ("online_dpo", "grpo", "rloo") else offline)(spec, watch)
    watch.time(trainer.accelerator, "backward", "backward")
    create = trainer.create_optimizer_and_scheduler

    def create_timed(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        watch.time(trainer.optimizer, "step", "optimizer")

    trainer.create_optimizer_and_scheduler = create_timed
    trainer.train()
    Path(spec["output"]).write_text(json.dumps(watch.steps))


def common(spec: dict[str, Any]) -> dict[str, Any]:
    """What keeps time out of the steps: no recomputation, no logging, no saving."""
    return {
        "output_dir": spec["folder"],
        "use_cpu": True,
        "bf16": spec["bf16"],
        "gradient_checkpointing": False,
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "train_sampling_strategy": "sequential",
    }


def load(spec: dict[str, Any], auto: Any, **more: Any) -> Any:
    return auto.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa", **more)


def online(spec: dict[str, Any], watch: Stopwatch) -> Any:
    """Sampling, a rule's score, one optimizer step on the whole batch."""
    data = load_dataset("json", data_files=spec["data"], split="train")
    data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    model, tokenizer = load(spec, AutoModelForCausalLM), AutoTokenizer.from_pretrained(spec["model"])
    settings = common(spec) | {"beta": spec["beta"], "temperature": 1.0} | spec.get("more", {})
    micro = spec["micro"]
    settings |= {"gradient_accumulation_steps": spec["sequences"] // micro}
    if spec["method"] == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        # It samples within each accumulation step, two responses a prompt.
        settings |= {"per_device_train_batch_size": micro // 2, "max_new_tokens": spec["response_tokens"]}
        config = OnlineDPOConfig(**settings)
        trainer: Any = OnlineDPOTrainer(
            model, None, characters, config, train_dataset=data, processing_class=tokenizer, callbacks=[watch]
        )
        watch.time(trainer, "_generate_vllm" if config.use_vllm else "_generate", "generate")
        count_online_dpo(trainer, watch)
    else:
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        settings |= {"per_device_train_batch_size": micro, "num_generations": spec["group_size"]}
        settings |= {"max_completion_length": spec["response_tokens"], "shuffle_dataset": False}
        kinds = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
        config_class, trainer_class = kinds[spec["method"]]
        trainer = trainer_class(
            model, characters, config_class(**settings), data, processing_class=tokenizer, callbacks=[watch]
        )
        watch.time(trainer, "_generate", "generate")
        count_grpo(trainer, watch)
    watch.time(trainer.ref_model, "forward", "reference")
    return trainer


def count_online_dpo(trainer: Any, watch: Stopwatch) -> None:
    forward = trainer._forward

    def counting(model: Any, prompt_ids: Any, prompt_mask: Any, completion_ids: Any, completion_mask: Any, *rest: Any):
        if model is not trainer.ref_model:
            watch.tokens += int(prompt_mask.sum() + completion_mask.sum())
            watch.response_tokens += int(completion_mask.sum())
        return forward(model, prompt_ids, prompt_mask, completion_ids, completion_mask, *rest)

    trainer._forward = counting


def count_grpo(trainer: Any, watch: Stopwatch) -> None:
    compute = trainer._generate_and_score_completions

    def counting(inputs: Any) -> Any:
        output = compute(inputs)
        watch.tokens += int(output["prompt_mask"].sum() + output["completion_mask"].sum())
        watch.response_tokens += int(output["completion_mask"].sum())
        return output

    trainer._generate_and_score_completions = counting


def offline(spec: dict[str, Any], watch: Stopwatch) -> Any:
    """Stored pairs."""
    data = load_dataset("json", data_files=spec["data"], split="train")
    data = data.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    pairs, micro = spec["prompts"], spec["micro"] // 2
    settings = common(spec) | {"per_device_train_batch_size": micro, "gradient_accumulation_steps": pairs // micro}
    settings |= {"max_length": spec["max_tokens"]} | spec.get("more", {})
    if spec["method"] == "dpo":
        from trl import DPOConfig, DPOTrainer

        model = load(spec, AutoModelForCausalLM)
        config = DPOConfig(**settings, beta=spec["beta"])
        trainer: Any = DPOTrainer(model, None, config, None, data, processing_class=tokenizer, callbacks=[watch])
        watch.time(trainer.ref_model, "forward", "reference")
    else:
        from trl import RewardConfig, RewardTrainer

        model = load(spec, AutoModelForSequenceClassification, num_labels=1)
        config = RewardConfig(**settings)
        trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
    compute = trainer.compute_loss

    def counting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        watch.tokens += int(inputs["attention_mask"].sum())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    return trainer


if __name__ == "__main__":
    main()
