from typing import Any

import pytest

from raylhf.config import RunConfig


@pytest.fixture
def build():
    return build_config


def build_config(changes: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "x",
        "num_steps": 5,
        "model": {"path": "tiny"},
        "data": {"path": "p"},
        "rollout": {"prompts_per_step": 8},
        "reward": {"graph": {"kind": "sentiment"}},
    }
    for key, value in changes.items():
        *above, last = key.split(".")
        node = raw
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return RunConfig.model_validate(raw)
