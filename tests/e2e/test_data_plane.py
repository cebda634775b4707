"""What passes through the driver, on a real Ray: summaries, and no responses, however short they are."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.experimental import get_object_locations

from raylhf.batch import Prompt, Rollouts
from raylhf.cluster.actors import Launcher, kill, submit
from raylhf.cluster.session import object_store_use, ray_session
from raylhf.config.cluster import ClusterConfig
from raylhf.driver.job import ENVIRONMENT

TIMEOUT_S = 60.0


def test_responses_stay_where_they_were_sampled_and_what_they_take_is_seen():
    class Sampler:  # defined here, so that Ray sends it to the actor, which cannot import this file
        def generate(self) -> Any:
            """What a rollout worker gives for two short responses."""
            rollouts = Rollouts(
                prompts=[Prompt(0, ({"role": "user", "content": "Hello"},))] * 2,
                prompt_ids=[np.arange(5)] * 2,
                response_ids=[np.arange(4)] * 2,
                rollout_logprobs=[np.zeros(4, dtype=np.float32)] * 2,
                response_texts=["word"] * 2,
                finish_reasons=["stop", "stop"],
                policy_versions=[np.zeros(4, dtype=np.int64)] * 2,
                temperature=1.0,
            )
            return rollouts, {"num_tokens": 8, "lengths": [4, 4]}

        def large(self) -> np.ndarray:
            return np.zeros(4_000_000)

    def place_of(reference: Any) -> dict[str, Any]:
        return get_object_locations([reference])[reference]

    with ray_session(ClusterConfig(), env=ENVIRONMENT):
        actor = Launcher("sampler", Sampler, num_cpus=0, num_gpus=0, env={}).launch(0)
        rollouts, summary = submit(actor, "generate", num_returns=2)
        assert ray.get(summary, timeout=TIMEOUT_S) == {"num_tokens": 8, "lengths": [4, 4]}
        wait_until(lambda: len(place_of(rollouts)["node_ids"]) == 1)  # in an object store
        assert place_of(summary)["node_ids"] == []  # sent to the caller
        large = submit(actor, "large")
        wait_until(lambda: 0.1 < max(object_store_use().values()) < 0.2)  # 32 MB of 256 MiB
        del large
        wait_until(lambda: max(object_store_use().values()) < 0.01)
        kill(actor)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, object_store_use()
        time.sleep(0.1)
