"""A driver that logs rows as a run does: `python gauges_driver.py PORT FOLDER`. It ends when its input does."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from raylhf.cluster.health import Health, Pulse
from raylhf.cluster.session import ray_session
from raylhf.config import RunConfig
from raylhf.driver.exports import exporting, live_values
from raylhf.tracking import Tracker
from raylhf.tracking.catalogue import METRICS
from raylhf.tracking.exported import EXPORTED

KL_PER_TOKEN = 0.9
RUN = "lab-1"


def settings() -> RunConfig:
    raw: dict[str, Any] = {
        "name": RUN,
        "num_steps": 4,
        "model": {"path": "tiny"},
        "data": {"path": "p"},
        "rollout": {"prompts_per_step": 2},
        "reward": {"graph": {"kind": "length"}},
        "tracking": {"wandb": "disabled", "console": "plain"},
        "cluster": {"cpus_per_node": 1},
    }
    return RunConfig.model_validate(raw)


def pool(role: str, *states: Health) -> Any:
    members = {number: SimpleNamespace(health=Pulse(1, 1, health).health) for number, health in enumerate(states)}
    return SimpleNamespace(role=role, members=members, num_restarts=2)


if __name__ == "__main__":
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    config = settings()
    tracker = Tracker(config, folder, None, num_steps=4)
    workers = SimpleNamespace(
        rollout=pool("rollout", Health.HEALTHY, Health.HEALTHY, Health.STALE),
        reward=pool("reward", Health.HEALTHY),
        num_learner_restarts=1,
    )
    batches = SimpleNamespace(stages=lambda: {"waiting": 3, "sampling": 2, "scoring": 1, "scored": 0})
    with ray_session(config.cluster, env={}, prometheus_port=port), exporting(config.name, tracker) as gauges:
        gauges.look = lambda: live_values(cast(Any, workers), cast(Any, batches))
        tracker.log(1, {key: 0.25 for exported in EXPORTED.values() for key in exported.keys if key in METRICS})
        tracker.log(2, {"policy/kl_to_ref_per_token": KL_PER_TOKEN, "kl/coef": float("nan"), "time/step_s": 0.5})
        print("logged", flush=True)
        sys.stdin.read()
