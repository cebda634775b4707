"""What a check of settings finds."""

from dataclasses import dataclass

from raylhf.config.schema import Path, dotted


@dataclass(frozen=True)
class Problem:
    """One combination of settings that cannot run."""

    path: Path
    """The key to change."""
    text: str
    """Value, reason and remedy."""

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.text}"


def problem_at(key: str, text: str) -> Problem:
    """A problem at a dotted key."""
    return Problem(tuple(int(part) if part.isdigit() else part for part in key.split(".")), text)
