"""The error of every mistake in settings."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """Settings that cannot run: one readable line for each problem, all problems at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
