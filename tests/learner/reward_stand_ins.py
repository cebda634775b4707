"""Judgements, settings and ranks for tests of the learner of reward models."""

import io
import json
import os
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stand_ins import ENVIRONMENT, process_context

from raylhf.config.run import AnyRunConfig, PreferenceRunConfig, RewardModelRunConfig
from raylhf.models.tiny import write_tiny_model

TIMEOUT_S = 300.0
LETTERS = "abcdefgh"
VALUES = dict(zip(LETTERS, np.linspace(-1, 1, len(LETTERS)), strict=True))
"""The known scorer: a text is worth the mean of its letters."""


def worth(text: str) -> float:
    """What the known scorer says."""
    return float(np.mean([VALUES[letter] for letter in text]))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def random_text(rng: np.random.Generator, shortest: int = 3, longest: int = 14) -> str:
    """Letters; texts tend to high or low ones, so that their worth varies."""
    taste = np.exp(rng.normal() * 1.5 * np.linspace(-1, 1, len(LETTERS)))
    return "".join(rng.choice(list(LETTERS), int(rng.integers(shortest, longest + 1)), p=taste / taste.sum()))


def make_reward_config(
    folder: str, path: str, *, kind: str, loss: dict[str, Any], head: dict[str, Any] | None = None, **sections: Any
) -> RewardModelRunConfig:
    """A run on the model in `folder`; keyword arguments replace single settings of a section."""
    raw: dict[str, Any] = {
        "name": "test",
        "model": {"path": folder},
        "data": {"path": path, "kind": kind, "held_out": 0},
        "objective": {
            "kind": "reward_model",
            "loss": loss,
            "head": head or {"kind": "scalar"},
            "batch_size": 6,
        },
        "learner": {"zero_stage": 0, "lr": 1e-2, "adam_eps": 1e-3, "micro_batch_tokens": 400},
    }
    for name, changes in sections.items():
        raw[name] = {**raw.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return RewardModelRunConfig.model_validate(raw)


class Ranks:
    """What a function on a rank may use: it starts one worker after the other in one process group."""

    def __init__(self, rank: int, num_ranks: int, ports: Any) -> None:
        self.rank = rank
        self._num_ranks = num_ranks
        self._ports = ports
        self._has_joined = False

    def start(self, config: AnyRunConfig) -> Any:
        """A started worker with these settings, on as many ranks as there are."""
        from raylhf.learner import engine

        learner = config.learner.model_copy(update={"num_ranks": self._num_ranks})
        config = config.model_copy(update={"learner": learner})
        worker = worker_of(config, self.rank)
        port = 0
        if self._has_joined:
            engine.join_group = lambda *args, **kwargs: None  # a process joins once
        elif self.rank == 0:
            port = worker.open_rendezvous()
            for _ in range(self._num_ranks - 1):
                self._ports.put(port)
        else:
            port = self._ports.get(timeout=TIMEOUT_S)
        self._has_joined = True
        worker.start("127.0.0.1", port)
        return worker


def worker_of(config: AnyRunConfig, rank: int) -> Any:
    """The learner of this kind of run."""
    from raylhf.learner import preference_worker, reward_worker, worker

    folder, second = config.model.path, getattr(config, "second_model", None) or config.model.path
    if isinstance(config, RewardModelRunConfig):
        return reward_worker.RewardLearnerWorker(config, folder, rank=rank)
    if isinstance(config, PreferenceRunConfig):
        return preference_worker.PreferenceLearnerWorker(config, folder, second, rank=rank)
    return worker.LearnerWorker(config, folder, second, rank=rank)


def weights_of(worker: Any) -> dict[str, torch.Tensor]:
    """Full weights by name, on rank 0."""
    return worker._full_state()


def on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """Call `function(ranks, *args)` on each rank, each a process of its own; their answers by rank."""
    context = process_context()
    ports, results = context.Queue(), context.Queue()
    processes = [
        context.Process(target=_rank_main, args=(function, rank, num_ranks, ports, results, args))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, data, failure = results.get(timeout=TIMEOUT_S)
            assert not failure, failure
            answers[rank] = torch.load(io.BytesIO(data), weights_only=False)
    except queue.Empty:
        raise TimeoutError(f"{function.__name__}: no answer from every rank within {TIMEOUT_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(answers) == num_ranks else 0)
            process.kill()
    return [answers[rank] for rank in range(num_ranks)]


def _rank_main(function: Callable[..., Any], rank: int, num_ranks: int, ports: Any, results: Any, args: Any) -> None:
    os.environ.update(ENVIRONMENT)
    try:
        answer = function(Ranks(rank, num_ranks, ports), *args)
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    # As bytes: a tensor in a queue is shared memory that ends with this process.
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    results.put((rank, buffer.getvalue(), None))


def tiny_folder(path: Path) -> str:
    """The tiny model with its byte tokenizer."""
    return write_tiny_model(path, seed=0)
