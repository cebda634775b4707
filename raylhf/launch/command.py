"""What a scheduler's job runs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A config and overrides, as they were given to `raylhf launch`."""

    config: str
    overrides: Sequence[str]
