"""raylhf's engines by themselves, without Ray: vLLM, and the learner on one or more ranks, in their own processes."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Responses = list[list[np.ndarray]]
"""Response tokens by prompt."""
TIMEOUT_S = 1800.0


def vllm_alone(settings: dict[str, Any], folder: str, prompts: Sequence[Sequence[list[int]]]) -> dict[str, Any]:
    """Seconds of each step's sampling; `prompts` are token ids by step. Also the responses of the last step."""
    return _in_processes(_sample, 1, settings, folder, prompts)[0]


def learner_alone(
    settings: dict[str, Any], folder: str, prompts: Sequence[list[int]], responses: Responses, *, steps: int
) -> dict[str, Any]:
    """Seconds of each of so many updates on the same responses, and rank 0's last metrics."""
    num_ranks = settings["learner"].get("num_ranks", 1)
    return _in_processes(_learn, num_ranks, settings, folder, prompts, responses, steps)[0]


def _sample(settings: dict[str, Any], folder: str, prompts: Sequence[Sequence[list[int]]], **_: Any) -> dict[str, Any]:
    from raylhf.config import RunConfig
    from raylhf.rollout.engine import engine_arguments, set_environment

    config = RunConfig.model_validate(settings)
    set_environment(config)
    from vllm import LLM, SamplingParams

    engine = LLM(**engine_arguments(config, folder))
    sampling = config.rollout.sampling
    wanted = {"temperature": sampling.temperature, "max_tokens": sampling.max_response_tokens, "logprobs": 0}
    seconds, outputs = [], []
    for step in prompts:
        inputs = [{"prompt_token_ids": ids} for ids in step for _ in range(config.rollout.group_size)]
        parameters = [SamplingParams(seed=i, detokenize=False, ignore_eos=False, **wanted) for i in range(len(inputs))]
        began = time.perf_counter()
        outputs = engine.generate(inputs, parameters, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
    tokens = [np.array(output.outputs[0].token_ids, dtype=np.int64) for output in outputs]
    size = config.rollout.group_size
    return {"seconds": seconds, "responses": [tokens[i : i + size] for i in range(0, len(tokens), size)]}


def _learn(
    settings: dict[str, Any],
    folder: str,
    prompts: Sequence[list[int]],
    responses: Responses,
    steps: int,
    *,
    rank: int,
    port: Callable[[int | None], int],
) -> dict[str, Any]:
    from raylhf.batch import Prompt, RewardOutput, Rollouts
    from raylhf.config import RunConfig
    from raylhf.learner.worker import LearnerWorker

    config = RunConfig.model_validate(settings)
    worker = LearnerWorker(config, folder, folder, rank=rank)
    worker.start("127.0.0.1", port(worker.open_rendezvous() if rank == 0 else None))
    rng = np.random.default_rng(rank)
    groups, rewards = [], []
    for index in range(rank, len(prompts), config.learner.num_ranks):
        own = responses[index]
        groups.append(
            Rollouts(
                prompts=[Prompt(index, ({"role": "user", "content": "x"},))] * len(own),
                prompt_ids=[np.array(prompts[index], dtype=np.int64)] * len(own),
                response_ids=own,
                rollout_logprobs=[np.full(len(ids), -1.0, dtype=np.float32) for ids in own],
                response_texts=[""] * len(own),
                finish_reasons=("length",) * len(own),
                policy_versions=[np.zeros(len(ids), dtype=np.int64) for ids in own],
                temperature=1.0,
            )
        )
        rewards.append(RewardOutput(scores=rng.normal(size=len(own)), valid=np.ones(len(own), dtype=bool)))
    seconds, metrics = [], {}
    for _ in range(steps):
        began = time.perf_counter()
        metrics = worker.update(groups, rewards)
        seconds.append(time.perf_counter() - began)
    worker.close()
    return {"seconds": seconds, "metrics": {key: metrics[key] for key in metrics if key.startswith("learn/")}}


def _in_processes(function: Callable[..., Any], count: int, settings: dict[str, Any], *args: Any) -> list[Any]:
    """What the function returns in each of `count` new processes, whose first learns the others a port."""
    context = multiprocessing.get_context("spawn")
    results, ports = context.Queue(), context.Queue()
    threads = settings["learner"]["threads"] if count > 1 else 2
    processes = [
        context.Process(target=_run, args=(function, rank, count, threads, settings, args, results, ports))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=TIMEOUT_S) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
    for answer in found.values():
        if isinstance(answer, str):
            raise SystemExit(answer)
    return [found[rank] for rank in range(count)]


def _run(
    function: Callable[..., Any],
    rank: int,
    count: int,
    threads: int,
    settings: dict[str, Any],
    args: Any,
    results: Any,
    ports: Any,
) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}

    def port(own: int | None) -> int:
        for _ in range(count - 1 if own is not None else 0):
            ports.put(own)
        return ports.get(timeout=TIMEOUT_S) if own is None else own

    more = {"rank": rank, "port": port} if function is _learn else {}
    try:
        results.put((rank, function(settings, *args, **more)))
    except Exception:
        import traceback

        results.put((rank, traceback.format_exc()))
