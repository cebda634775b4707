"""Settings, rollouts and learner ranks for tests of the learner, without Ray and vLLM."""

import io
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.config import RunConfig
from raylhf.models.tiny import tiny_model

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 300.0
"""Of one call on all ranks: ten times what it takes on two cores that do nothing else."""
NUM_PROMPTS, VOCAB = 8, 32


def make_config(folder: str, *, num_steps: int = 10, **sections: dict[str, Any]) -> RunConfig:
    """A run on the model in `folder` with small defaults; keyword arguments replace single settings of a section."""
    raw: dict[str, Any] = {
        "name": "test",
        "num_steps": num_steps,
        "model": {"path": folder},
        "data": {"path": "unused"},
        "rollout": {"prompts_per_step": NUM_PROMPTS, "group_size": 2},
        "reward": {"graph": {"kind": "format"}},
        "learner": {"zero_stage": 0, "lr": 1e-2, "micro_batch_tokens": 40},
        "objective": {"num_epochs": 1, "critic": {"trunk": "shared", "lr": 1e-2}},
    }
    for name, changes in sections.items():
        raw[name] = {**raw.get(name, {}), **changes}
    return RunConfig.model_validate(raw)


def write_model(folder: str, *, vocab_size: int = VOCAB, tie: bool = False) -> str:
    """A tiny model without a tokenizer."""
    model = tiny_model(vocab_size=vocab_size, seed=0)
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    return folder


def scored_groups(seed: int = 0) -> tuple[list[Rollouts], list[RewardOutput]]:
    """Eight groups of two ragged responses of random tokens; one score is invalid and one response is empty."""
    rng = np.random.default_rng(seed)
    rollouts, rewards = [], []
    for index in range(NUM_PROMPTS):
        prompt_ids = rng.integers(0, VOCAB, int(rng.integers(2, 7)))
        lengths = [int(n) for n in rng.integers(1, 9, 2)]
        if index == 5:
            lengths[0] = 0
        responses = [rng.integers(0, VOCAB, n) for n in lengths]
        rollouts.append(
            Rollouts(
                prompts=[Prompt(index, ({"role": "user", "content": "x"},))] * 2,
                prompt_ids=[prompt_ids] * 2,
                response_ids=responses,
                rollout_logprobs=[np.full(n, -3.4, dtype=np.float32) for n in lengths],
                response_texts=["", ""],
                finish_reasons=["stop", "length"],
                policy_versions=[np.zeros(n, dtype=np.int64) for n in lengths],
                temperature=0.8,
            )
        )
        valid = np.array([n > 0 for n in lengths]) & np.array([True, index != 3])
        rewards.append(RewardOutput(scores=np.where(valid, rng.normal(size=2), np.nan), valid=valid))
    return rollouts, rewards


def process_context() -> ForkServerContext:
    """Starts processes that have what takes seconds to import, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "peft", "raylhf.learner.worker"])
    with patch.dict(os.environ, ENVIRONMENT):  # the libraries read it when they are imported
        forkserver.ensure_running()
    return context


def run_ranks(function: Callable[..., Any], config: RunConfig, *args: Any) -> list[Any]:
    """Call `function(learner, rank, *args)` on every rank, each a started LearnerWorker in its own process."""
    context = process_context()
    ports, results = context.Queue(), context.Queue()
    world_size = config.learner.num_ranks
    processes = [
        context.Process(target=_rank_main, args=(function, config, rank, ports, results, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=TIMEOUT_S) for _ in processes]
    except queue.Empty:
        raise TimeoutError(f"{function.__name__}: no answer from every rank within {TIMEOUT_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failures = [failure for _, _, failure in answers if failure]
    assert not failures, "\n".join(failures)
    ordered = sorted(answers, key=lambda answer: answer[0])
    return [torch.load(io.BytesIO(data), weights_only=False) for _, data, _ in ordered]


def _rank_main(
    function: Callable[..., Any], config: RunConfig, rank: int, ports: Any, results: Any, args: Sequence[Any]
) -> None:
    os.environ.update(ENVIRONMENT)
    try:
        answer = function(start_learner(config, rank, ports), rank, *args)
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    # As bytes: a tensor in a queue is shared memory that ends with this process.
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    results.put((rank, buffer.getvalue(), None))


def start_learner(config: RunConfig, rank: int, ports: Any) -> Any:
    """A started learner rank; `ports` carries rank 0's port to the others."""
    from raylhf.learner.worker import LearnerWorker

    learner = LearnerWorker(config, config.model.path, config.model.path, rank=rank)
    if rank == 0:
        port = learner.open_rendezvous()
        for _ in range(config.learner.num_ranks - 1):
            ports.put(port)
    else:
        port = ports.get(timeout=TIMEOUT_S)
    learner.start("127.0.0.1", port)
    return learner


def weights_of(learner: Any) -> dict[str, torch.Tensor]:
    """The policy's full weights by checkpoint name."""
    return {name: weight.clone() for name, weight in learner._weights}


def share_of(rank: int, num_ranks: int, seed: int = 0) -> tuple[list[Rollouts], list[RewardOutput]]:
    """This rank's groups of `scored_groups`."""
    rollouts, rewards = scored_groups(seed)
    size = NUM_PROMPTS // num_ranks
    return rollouts[rank * size :][:size], rewards[rank * size :][:size]
