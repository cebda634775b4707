"""Prompts: where they come from, which are held out, and in which order they are drawn."""

from raylhf.text.prompts import PromptOrder, drop_overlong, load_prompts, split_held_out

__all__ = ["PromptOrder", "drop_overlong", "load_prompts", "split_held_out"]
