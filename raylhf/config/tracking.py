"""Where metrics and samples go; `metrics.jsonl` and `samples.jsonl` are always written."""

from typing import Literal

from pydantic import Field

from raylhf.config.base import Settings


class TrackingConfig(Settings):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases: auto is online where WANDB_API_KEY is set, else offline."""
    project: str = "raylhf"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null means the key's default."""
    tags: tuple[str, ...] = ()
    """W&B tags."""
    console: Literal["auto", "live", "plain"] = "auto"
    """Live panel with a progress bar on a terminal, or one plain line a step; auto looks at stdout."""
    samples_per_step: int = Field(default=4, ge=0)
    """Responses a step that go to `samples.jsonl` and the W&B table."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Port, on every interface, at which a Ray that raylhf starts itself exports metrics; null means any free one."""
