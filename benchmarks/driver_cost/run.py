"""What the driver costs as rollout workers are added: CPU time and bytes for 1,000 trajectories, with stand-in workers.

    python benchmarks/driver_cost/run.py

The driver's own code (pool, collection) on a real Ray; the workers answer at once with responses of 512 tokens, so that
what is measured is the driver alone. The results go into results.json beside this file.
"""

import argparse
import json
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.cluster.actors import Launcher
from raylhf.cluster.pool import WorkerPool
from raylhf.cluster.session import ray_session
from raylhf.config import RunConfig
from raylhf.config.cluster import ClusterConfig
from raylhf.driver import collect
from raylhf.driver.collect import Collection
from raylhf.driver.job import ENVIRONMENT

RESULTS = Path(__file__).parent / "results.json"
GROUP_SIZE = 8
NUM_TOKENS = 512
ROUNDS = 3


class StandInRollout:
    """Gives responses without sampling them."""

    async def start(self) -> dict[str, Any]:
        return {}

    async def ping(self) -> int:
        return 0

    async def generate(self, prompt: Prompt, *, num_responses: int, seed: int, with_sample: bool) -> Any:
        ids = np.full(NUM_TOKENS, seed % 1000)
        rollouts = Rollouts(
            prompts=[prompt] * num_responses,
            prompt_ids=[np.zeros(64, dtype=np.int64)] * num_responses,
            response_ids=[ids + j for j in range(num_responses)],
            rollout_logprobs=[np.zeros(NUM_TOKENS, dtype=np.float32) - j for j in range(num_responses)],
            response_texts=["x" * 4 * NUM_TOKENS] * num_responses,
            finish_reasons=cast(Any, ["stop"] * num_responses),
            policy_versions=[np.zeros(NUM_TOKENS, dtype=np.int64)] * num_responses,
            temperature=1.0,
        )
        return rollouts, {"num_tokens": NUM_TOKENS * num_responses, "lengths": [NUM_TOKENS] * num_responses}


class StandInReward:
    """Gives every response the same score."""

    async def start(self) -> dict[str, Any]:
        return {}

    async def ping(self) -> int:
        return 0

    async def score(self, rollouts: Rollouts) -> Any:
        count = len(rollouts)
        scores = [1.0] * count
        summary = {
            "scores": scores,
            "valid": [True] * count,
            "resample": [False] * count,
            "seconds": 0.0,
            "sources": [],
        }
        return RewardOutput(scores=np.array(scores), valid=np.ones(count, dtype=bool)), summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=int, default=2048, help="prompts of a batch, of 8 responses each")
    arguments = parser.parse_args()
    rows = measure_all(arguments.workers, num_prompts=arguments.prompts)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def measure_all(counts: Sequence[int], *, num_prompts: int) -> list[dict[str, float]]:
    """The driver's cost with each number of rollout workers, on a Ray of its own."""
    rows = []
    # Workers import this module by its name where another script has imported it.
    with ray_session(ClusterConfig(cpus_per_node=2), env=ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[1])}):
        for count in counts:
            rows.append(measure(count, num_prompts))
            print(rows[-1], flush=True)
    return rows


def measure(num_workers: int, num_prompts: int) -> dict[str, float]:
    """The driver's cost with this many rollout workers; the least of some rounds, for other work disturbs."""
    config = RunConfig.model_validate(
        {
            "name": "driver_cost",
            "num_steps": 1,
            "model": {"path": "tiny"},
            "data": {"path": "none"},
            "rollout": {"prompts_per_step": num_prompts, "group_size": GROUP_SIZE},
            "reward": {"graph": {"kind": "format"}},
        }
    )
    rollout, reward = (_pool("rollout", StandInRollout, num_workers), _pool("reward", StandInReward, 1))
    statistics = SimpleNamespace(is_observing=False)

    def tend(*, may_publish: bool = True) -> bool:
        rollout.poll()
        reward.poll()
        return False

    workers = SimpleNamespace(config=config, rollout=rollout, reward=reward, statistics=statistics, tend=tend)
    prompts = [Prompt(i, ({"role": "user", "content": "word " * 50},)) for i in range(num_prompts)]
    rounds = []
    for number in range(ROUNDS + 1):
        made = Collection(
            cast(Any, workers), prompts, num_responses=GROUP_SIZE, seed_key=(number,), should_stop=lambda: False
        )
        # Counting costs time itself: the last round counts, the others are timed.
        counting = _counting_bytes() if number == ROUNDS else nullcontext(list[int]())
        cpu, wall = time.process_time(), time.monotonic()
        with counting as read:
            made.run()
        thousands = num_prompts * GROUP_SIZE / 1000
        rounds.append(
            {
                "workers": num_workers,
                "cpu_s_per_1000": round((time.process_time() - cpu) / thousands, 4),
                "kib_read_per_1000": round(sum(read) / thousands / 1024, 1),
                "kib_sent_per_1000": round(sum(len(pickle.dumps(p)) for p in prompts) / thousands / 1024, 1),
                "wall_s_per_1000": round((time.monotonic() - wall) / thousands, 4),
            }
        )
    rollout.kill()
    reward.kill()
    best = min(rounds[:ROUNDS], key=lambda row: row["cpu_s_per_1000"])
    return best | {"kib_read_per_1000": rounds[ROUNDS]["kib_read_per_1000"]}


def _pool(role: str, build: type, size: int) -> WorkerPool:
    launcher = Launcher(role, build, num_cpus=0, num_gpus=0, env={"OMP_NUM_THREADS": "1"}, is_async=True)
    pool = WorkerPool(
        launcher,
        lambda number: ((), {}),
        size=size,
        silence_s=120.0,
        start_timeout_s=300.0,
        max_losses=0,
        on_loss=lambda loss: None,
    )
    while len(pool.up()) < size:
        pool.poll()
        time.sleep(0.1)
    for number in pool.up():
        pool.refreshed(number)
    return pool


@contextmanager
def _counting_bytes() -> Iterator[list[int]]:
    """The pickled sizes of all values that the collection reads inside, as they come."""
    read: list[int] = []
    take = collect.take_finished

    def counted(pending: dict[Any, Any], **options: Any) -> Any:
        outcomes = take(pending, **options)
        read.extend(len(pickle.dumps(outcome.value)) for outcome in outcomes.values())
        return outcomes

    collect.take_finished = counted
    try:
        yield read
    finally:
        collect.take_finished = take


if __name__ == "__main__":
    main()
