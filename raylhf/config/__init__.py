"""Typed, frozen settings of a run. Importing this package loads no torch."""

from raylhf.config.errors import ConfigError
from raylhf.config.run import RunConfig

__all__ = ["ConfigError", "RunConfig"]
