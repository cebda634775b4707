"""Where prompts come from."""

from pydantic import Field

from raylhf.config.base import Settings


class DataConfig(Settings):
    path: str
    """JSONL or Parquet file, a folder of them, or the name of a Hugging Face dataset; relative to the config file."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset that has several (`main` of openai/gsm8k)."""
    prompt_key: str = "prompt"
    """Field that holds the prompt: a string, or a list of chat messages ({role, content}); the rest is metadata."""
    system_prompt: str | None = None
    """Put before every prompt that has no system message of its own."""
    held_out: int = Field(default=32, ge=0)
    """Number of prompts kept from training, drawn by seed, on which the policy is evaluated."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """A longer prompt (chat template included) is dropped and counted."""
    shuffle: bool = True
    """Draw prompts in an order shuffled anew in every epoch by the run's seed; false keeps the file's order."""
