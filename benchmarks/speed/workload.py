"""The work that both sides get: the model, prompts and judgements made from a seed, lengths, batches, threads."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Method = Literal["online_dpo", "grpo", "rloo", "dpo", "reward_model"]
SEED = 0
VOCABULARY = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education the of and to in is that it was for on are with as his they at be this from have or by one had
not but what all were when we there can an your which their said if do will each about how up out them then she many
some so these would other into has more her two like him see
"""
"""Words that are mostly one token."""

ASKED = (
    "Say one word",
    "Write one short sentence",
    "Write two sentences",
    "Explain in a paragraph what you think",
    "Write a very long story, without an end,",
)
"""From short answers to such as never end."""


@dataclass(frozen=True)
class Workload:
    """A method on its data; equal for both sides."""

    method: Method
    sequences: int
    """In one optimizer step: responses sampled, or rows of pairs (two a pair)."""
    group_size: int = 2
    """Responses of one prompt."""
    response_tokens: int = 64
    """Most tokens of a sampled response."""
    mixed: bool = False
    """The prompts ask for answers of all lengths; else for long ones, so that nearly all have `response_tokens`."""
    max_tokens: int = 512
    """Longest row of a pair."""
    threads: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In bfloat16 the optimizer still has float32 weights, on both sides."""
    lr: float = 1e-6
    beta: float = 0.1
    """Weight of the KL to the reference: DPO's beta, GRPO's and RLOO's KL coefficient."""

    @property
    def is_online(self) -> bool:
        """Whether responses are sampled."""
        return self.method in ("online_dpo", "grpo", "rloo")

    @property
    def prompts(self) -> int:
        """In one optimizer step; of pairs there is one a prompt."""
        return self.sequences // self.group_size

    def as_json(self) -> dict[str, Any]:
        """With `prompts`, for the peer's script."""
        return asdict(self) | {"prompts": self.prompts}


WORKLOADS: dict[str, Workload] = {
    "online_dpo": Workload("online_dpo", sequences=16, group_size=2),
    "grpo": Workload("grpo", sequences=16, group_size=4, beta=0.04),
    "online_dpo_mixed": Workload("online_dpo", sequences=16, group_size=2, response_tokens=128, mixed=True),
    "grpo_mixed": Workload("grpo", sequences=16, group_size=4, beta=0.04, response_tokens=128, mixed=True),
    "rloo": Workload("rloo", sequences=16, group_size=4, beta=0.05),
    "dpo": Workload("dpo", sequences=16),
    "reward_model": Workload("reward_model", sequences=16, lr=1e-5),
}
WORKLOADS |= {f"{name}_bf16": replace(workload, dtype="bfloat16") for name, workload in WORKLOADS.items()}
"""Those in bfloat16 are for CPUs that have instructions for it."""


def write_data(workload: Workload, folder: Path, *, steps: int) -> Path:
    """Rows for so many steps, the same at every call; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = prompt_rows(ASKED if workload.mixed else ASKED[-1:]) if workload.is_online else pair_rows()
    path = folder / f"{workload.method}.jsonl"
    with path.open("w") as file:
        for _ in range(workload.prompts * steps):
            file.write(json.dumps(next(rows)) + "\n")
    return path


def prompt_rows(asked: Sequence[str]) -> Iterator[dict[str, str]]:
    """Prompts of mixed length that ask for something of `asked`."""
    write = writer(SEED)
    rng = np.random.default_rng((SEED, 1))
    while True:
        yield {"prompt": f"{rng.choice(asked)} about {write(int(rng.integers(4, 40)))}."}


def pair_rows() -> Iterator[dict[str, str]]:
    """Pairs whose rows (chat template, prompt and response) have lognormal lengths between about 32 and 512 tokens."""
    write = writer(SEED)
    rng = np.random.default_rng((SEED, 2))
    while True:
        prompt_words = int(rng.integers(4, 24))
        chosen, rejected = (int(np.clip(rng.lognormal(np.log(110), 0.8), 4, 440)) for _ in range(2))
        yield {"prompt": write(prompt_words), "chosen": write(chosen), "rejected": write(rejected)}


def writer(seed: int) -> Callable[[int], str]:
    """Texts of so many words, most of which are one token."""
    rng = np.random.default_rng((seed, 0))

    def write(num_words: int) -> str:
        return " ".join(rng.choice(VOCABULARY.split(), size=num_words))

    return write
