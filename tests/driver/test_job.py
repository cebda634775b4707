"""The environment of a run's workers."""

import os
from pathlib import Path

import pytest

from raylhf.config.load import load_config
from raylhf.driver.job import ENVIRONMENT, LONG_SPIN, environment_of

TINY = Path(__file__).parents[2] / "configs" / "tiny_ppo.yaml"


@pytest.mark.parametrize(
    ("setting", "has_room"),
    [
        ("", True),  # two threads sample, then two learn
        ("rollout.max_staleness=1", False),  # both at a time
        ("learner.num_ranks=2", False),
        ("rollout.max_replicas=2", False),
        ("reward.threads=2", False),
        ("cluster.address=10.0.0.1:6379", False),  # who else is there is not known
    ],
)
def test_threads_wait_awake_where_no_more_of_them_work_than_there_are_cores(
    setting: str, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    settings = ["learner.num_ranks=1", "learner.threads=2", "rollout.threads=2", *filter(None, [setting])]
    expected = LONG_SPIN if has_room else ENVIRONMENT["GOMP_SPINCOUNT"]
    assert environment_of(load_config(TINY, settings)) == ENVIRONMENT | {"GOMP_SPINCOUNT": expected}
