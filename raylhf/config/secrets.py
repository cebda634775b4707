"""What counts as a secret, and settings that hold one: they are refused, for a config is copied to many places."""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from raylhf.config.errors import ConfigError
from raylhf.config.schema import Path, dotted

if TYPE_CHECKING:
    from raylhf.config.source import Source

SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS)$", re.IGNORECASE)
"""Names of environment variables whose values are secret."""
MIN_SECRET_LENGTH = 8
"""Shorter values are ordinary words too often."""
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SECRET_KEY = re.compile(
    r"(.*_)?(token|api_?key|access_?key|secret|password|passwd|bearer|authorization)", re.IGNORECASE
)
_KNOWN = re.compile(
    r"\b(hf_|gh[oprsu]_|github_pat_|glpat-|sk-|wandb_v1_|xox[abp]-)[A-Za-z0-9_-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|PRIVATE KEY-----"
)
"""As Hugging Face, GitHub, GitLab, OpenAI, W&B, Slack and AWS make them."""
_IN_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@|[?&]\w*(key|token|secret|password|signature|sig)=[^&\s]", re.IGNORECASE)
_ASSIGNED = re.compile(r"\b\w*(KEY|TOKEN|SECRET|PASSWORD|PASSWD)=[\"']?[^\s\"'$/`]", re.IGNORECASE)
"""In a line of shell; what the shell looks up, and paths, are no secrets."""


def secret_values() -> list[str]:
    """The values of this process's secret environment variables, the longest first: one may hold another."""
    values = [v for name, v in os.environ.items() if SECRET_VARIABLE.search(name) and len(v) >= MIN_SECRET_LENGTH]
    return sorted(values, key=len, reverse=True)


def refuse_secrets(source: "Source") -> None:
    """Raises: ConfigError: a setting holds a secret. The lines say where and why, and never what it is."""
    values = secret_values()
    problems = []
    for path, text in _texts(source.data, ()):
        if why := _why_secret(path, text, values):
            origin = source.origin(path)
            where = "an override" if origin.startswith("override ") else origin  # which would show the value
            problems.append(
                f"{where}: {dotted(path)}: {why}; settings are copied into the run's folder, batch files and W&B, so "
                "take it out (and change it, if others could read it), and give it by an environment variable or a "
                "file that only you read"
            )
    if problems:
        raise ConfigError(problems)


def _why_secret(path: Path, text: str, values: list[str]) -> str | None:
    name = path[-1]
    if name == "token_env":
        return (
            None
            if _VARIABLE.fullmatch(text)
            else ("must be the name of an environment variable (capitals, digits, _), and looks like the token itself")
        )
    if isinstance(name, str) and _SECRET_KEY.fullmatch(name):
        return "a key of this name would hold a secret"
    if any(value in text for value in values):
        return "holds the value of a secret environment variable"
    if _KNOWN.search(text):
        return "looks like a token or a private key"
    if _IN_URL.search(text):
        return "is an address with a password or a token in it"
    if path[0] == "launch" and _ASSIGNED.search(text):
        return "sets a secret variable to a value that is written out"
    return None


def _texts(node: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Every text, with its path."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict | list):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(item, (*path, key))
