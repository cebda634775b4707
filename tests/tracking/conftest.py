import pytest

from raylhf.config import RunConfig

SMALL_RUN = {
    "name": "small",
    "num_steps": 4,
    "model": {"path": "tiny"},
    "data": {"path": "prompts.jsonl"},
    "rollout": {"prompts_per_step": 2},
    "reward": {"graph": {"kind": "length"}},
}


@pytest.fixture
def run_config():
    """`run_config(wandb="disabled", console="plain", ...)`: the settings of a small run with this tracking."""

    def make(**tracking):
        tracking = {"wandb": "disabled", "console": "plain", "samples_per_step": 2} | tracking
        return RunConfig.model_validate({**SMALL_RUN, "tracking": tracking})

    return make


@pytest.fixture(autouse=True)
def wandb_writes_into_tmp_path(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
