"""(g) The learner on one accelerator: tokens a second, model FLOP utilisation and peak memory, packed against padded.

    python benchmarks/speed/gpu.py                        # one GPU in bfloat16, about 4 minutes on an H100
    python benchmarks/speed/gpu.py --device cpu --tiny    # does it run at all

It needs neither Ray nor vLLM: the learner's workers are plain classes. Models have published shapes and random weights.
Each case is a process of its own. Where vLLM and Ray are there too, a whole run is timed as well. Prints one JSON.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # raylhf, where it is not installed

import numpy as np

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by what the name of a GPU (SXM form) contains, as their makers publish them."""
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 512,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "vocab_size": 151_936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151_936,
    },
}
"""Qwen2.5's, all with two key-value heads."""
GROUP_SIZE = 4
WARM, MEASURED = 2, 3
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model and short sequences")
    parser.add_argument("--tokens", type=int, default=16_384, help="learner.micro_batch_tokens")
    parser.add_argument("--seconds", type=float, default=240.0, help="no case is begun after so long")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
        return
    print(json.dumps(all_cases(arguments), indent=1))


def all_cases(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case, with the machine's name; one that fails says why and does not stop the others."""
    began, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments):
            if time.monotonic() - began > arguments.seconds:
                found.append({**case, "error": "not begun: out of time"})
                continue
            command = [sys.executable, __file__, "--case", json.dumps({**case, "folder": folder})]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.splitlines()
            result = {"error": done.stderr[-600:]} if done.returncode else json.loads(lines[-1])
            found.append({**case, **result})
            print(found[-1], file=sys.stderr, flush=True)
    results = {"device": device_name(arguments.device), "cases": found, "seconds": round(time.monotonic() - began)}
    if arguments.device == "cuda" and all(importlib.util.find_spec(name) for name in ("ray", "vllm")):
        results["whole_step"] = whole_step()
    return results


def cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, the most telling first."""
    if arguments.tiny:
        base = {"device": arguments.device, "shape": "tiny", "longest": 96, "budget": 512, "sequences": 16}
        return [
            {**base, "method": method, "packing": packing} for method in ("grpo", "dpo") for packing in (True, False)
        ]
    base = {"device": arguments.device, "sequences": 128}
    found = []
    for shape, method, longest in (("0.5b", "grpo", 2048), ("1.5b", "grpo", 2048), ("0.5b", "dpo", 4096)):
        budget = arguments.tokens if shape == "0.5b" else arguments.tokens // 2
        for packing in (True, False):
            more = {"shape": shape, "method": method, "longest": longest, "packing": packing, "budget": budget}
            found.append(base | more)
    return found


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step and what follows from them."""
    import torch

    rng = np.random.default_rng(SEED)
    sizes = draw_sizes(rng, case["sequences"], case["longest"])
    folder = write_model(Path(case["folder"]) / case["shape"], case)
    step = (online_step if case["method"] == "grpo" else offline_step)(case, folder, sizes, rng)
    seconds, metrics = [], {}
    for number in range(WARM + MEASURED):
        began = time.perf_counter()
        metrics = step(number)  # ends with numbers on the host, so nothing is left to run
        seconds.append(time.perf_counter() - began)
    step_s = float(np.median(seconds[WARM:]))
    trained = sum(prompt + response for prompt, response in sizes)
    result = {
        "step_s": round(step_s, 4),
        "tokens": trained,
        "tokens_per_s": round(trained / step_s),
        "peak_gib": round(metrics["memory/learner_peak_gib"], 2),
        "metrics": {key: value for key, value in metrics.items() if key.startswith("learn/")},
    }
    if case["device"] == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((peak for key, peak in PEAKS.items() if key in name), None)
        flops = model_flops(case, sizes)
        result |= {"model_tflops_per_s": round(flops / step_s / 1e12, 1), "assumed_peak_tflops": peak and peak / 1e12}
        result["mfu"] = peak and round(flops / step_s / peak, 4)
    return result


def draw_sizes(rng: np.random.Generator, count: int, longest: int) -> list[tuple[int, int]]:
    """(prompt, response) tokens of sequences in groups of one prompt; responses are lognormal."""
    found = []
    for _ in range(count // GROUP_SIZE):
        prompt = int(rng.integers(longest // 32, longest // 4))
        responses = np.clip(rng.lognormal(np.log(longest / 5), 0.8, GROUP_SIZE), 8, longest - prompt)
        found += [(prompt, int(response)) for response in responses]
    return found


def model_flops(case: dict[str, Any], sizes: list[tuple[int, int]]) -> float:
    """What the method's mathematics need: policy forward and backward (three forwards) and the reference's forward.

    Prompts count once a group, although each response is trained on with its own: what raylhf computes once or not
    does not change what is counted. No recomputation, no old log-probabilities (equal to the policy's at one pass).
    """
    shape = SHAPES[case["shape"]]
    vocabulary = shape["vocab_size"]
    d, f, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = 2 * d // shape["num_attention_heads"]
    per_token = 2 * layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    forward = 0.0
    for first in range(0, len(sizes), GROUP_SIZE):
        prompt = sizes[first][0]
        forward += prompt * per_token + 2 * layers * d * prompt * prompt
        for _, response in sizes[first : first + GROUP_SIZE]:
            forward += response * (per_token + 2 * vocabulary * d)
            forward += 4 * layers * d * response * (prompt + response / 2)
    return 4 * forward


def write_model(folder: Path, case: dict[str, Any]) -> str:
    """Random weights in the shape, with a byte tokenizer; once."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from raylhf.models.tiny import byte_tokenizer

    if not (folder / "config.json").exists():
        longest = max(4096, case["longest"])
        settings = {**SHAPES[case["shape"]], "num_key_value_heads": 2, "max_position_embeddings": longest}
        config = Qwen2Config(tie_word_embeddings=True, **settings)
        with torch.device(case["device"]):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype_of(case)))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return str(folder)


def dtype_of(case: dict[str, Any]) -> str:
    return "bfloat16" if case["device"] == "cuda" else "float32"


def settings_of(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """What both kinds of run share."""
    learner = {"zero_stage": 0, "lr": 1e-6, "micro_batch_tokens": case["budget"], "packing": case["packing"]}
    learner |= {"num_gpus": 1} if case["device"] == "cuda" else {"threads": 2}
    return {"name": "gpu", "num_steps": 100, "model": {"path": folder, "dtype": dtype_of(case)}, "learner": learner}


def online_step(case: dict[str, Any], folder: str, sizes: list[tuple[int, int]], rng: np.random.Generator) -> Any:
    """GRPO with a reference on sampled tokens."""
    from raylhf.batch import Prompt, RewardOutput, Rollouts
    from raylhf.config import RunConfig
    from raylhf.learner.worker import LearnerWorker

    settings = settings_of(case, folder) | {
        "data": {"path": "unused"},
        "rollout": {"prompts_per_step": len(sizes) // GROUP_SIZE, "group_size": GROUP_SIZE},
        "reward": {"graph": {"kind": "format"}},
        "objective": {"advantage": "grpo", "num_epochs": 1, "kl": {"coef": 0.04, "placement": "loss"}},
    }
    vocabulary = SHAPES[case["shape"]]["vocab_size"]
    rollouts, rewards = [], []
    for first in range(0, len(sizes), GROUP_SIZE):
        lengths = [response for _, response in sizes[first : first + GROUP_SIZE]]
        prompt = rng.integers(0, 256, sizes[first][0])
        rollouts.append(
            Rollouts(
                prompts=[Prompt(first, ({"role": "user", "content": "x"},))] * GROUP_SIZE,
                prompt_ids=[prompt] * GROUP_SIZE,
                response_ids=[rng.integers(0, vocabulary, n) for n in lengths],
                rollout_logprobs=[np.full(n, -np.log(vocabulary), dtype=np.float32) for n in lengths],
                response_texts=[""] * GROUP_SIZE,
                finish_reasons=("stop",) * GROUP_SIZE,
                policy_versions=[np.zeros(n, dtype=np.int64) for n in lengths],
                temperature=1.0,
            )
        )
        rewards.append(RewardOutput(scores=rng.normal(size=GROUP_SIZE), valid=np.ones(GROUP_SIZE, dtype=bool)))
    worker = LearnerWorker(RunConfig.model_validate(settings), folder, folder, rank=0)
    worker.start("127.0.0.1", worker.open_rendezvous())
    return lambda number: worker.update(rollouts, rewards)


def offline_step(case: dict[str, Any], folder: str, sizes: list[tuple[int, int]], rng: np.random.Generator) -> Any:
    """DPO on stored pairs, all of them in every step; a group is two pairs with one prompt. A letter is a token."""
    from raylhf.config.run import PreferenceRunConfig
    from raylhf.learner.preference_worker import PreferenceLearnerWorker

    def text(length: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnop"), size=length))

    rows = []
    for first in range(0, len(sizes), GROUP_SIZE):
        prompt = text(sizes[first][0])
        responses = [text(response) for _, response in sizes[first : first + GROUP_SIZE]]
        rows += [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in zip(responses[::2], responses[1::2], strict=True)
        ]
    data = Path(folder).parent / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(case, folder) | {
        "data": {"path": str(data), "kind": "pairs", "held_out": 0, "max_tokens": 2 * case["longest"]},
        "objective": {"kind": "preference", "batch_size": len(sizes) // GROUP_SIZE},
    }
    worker = PreferenceLearnerWorker(PreferenceRunConfig.model_validate(settings), folder, folder, rank=0)
    worker.start("127.0.0.1", worker.open_rendezvous())
    return worker.update


def whole_step() -> dict[str, Any]:
    """A GRPO run of SmolLM2-135M with engine and learner on one GPU."""
    sys.path.insert(0, str(Path(__file__).parent))
    import ours
    from workload import WORKLOADS, write_data

    folder = Path("runs/speed/gpu")
    data = write_data(WORKLOADS["grpo"], folder, steps=8)
    overrides = ("model.dtype=bfloat16", "rollout.num_gpus=0.4", "learner.num_gpus=0.6", "cluster.gpus_per_node=1")
    overrides += ("rollout.gpu_memory_utilization=0.4", "rollout.enforce_eager=false")
    return ours.run(WORKLOADS["grpo"], data, folder / "run", steps=8, overrides=overrides)


def device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
