"""Stored judgements of responses, which reward models and policies learn from."""

from typing import Literal

from pydantic import Field

from raylhf.config.base import Settings


class JudgementDataConfig(Settings):
    """Human (or other) judgements. docs/reward_data.md has the fields of each kind's rows."""

    path: str
    """JSONL (or .jsonl.gz) or Parquet file, a folder of them, or a Hugging Face dataset; relative to this file."""
    kind: Literal["pairs", "rankings", "scores", "attributes", "steps", "edits", "responses"]
    """What a row holds: a comparison, a ranking, a score, named scores, a solution in steps with their labels, a
    response with its edited form, or a response to learn from (`sft`)."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset that has several."""
    held_out: float = Field(default=0.1, ge=0)
    """Prompts kept from training, drawn by seed: a share below 1, or a number. All rows of a prompt stay together."""
    held_out_path: str | None = None
    """Judgements to evaluate on instead, from a source of their own; `held_out` must be 0 then."""
    subset_key: str | None = None
    """Field whose values are reported apart (accuracy by subset)."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longest prompt plus response; the prompt's beginning is cut first. Cut texts are counted."""
    step_separator: str = "\n\n"
    """Joins the steps of a solution into one response (`steps`)."""
