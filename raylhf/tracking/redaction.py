"""Keeps credentials out of what is logged."""

import io
import re
from typing import Any

from raylhf.config.secrets import secret_values

URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def without_secrets(value: Any) -> Any:
    """`value` with credentials in URLs, and the values of secret environment variables, replaced by ***.

    A variable is secret when its name ends in KEY, TOKEN, SECRET, PASSWORD or the like. Lists and dicts are walked.
    """
    return _redact(value, secret_values())


class RedactedStream(io.TextIOWrapper):
    """Text to an open file descriptor, line by line and without secrets; the descriptor stays open at the end."""

    def __init__(self, descriptor: int) -> None:
        file = io.FileIO(descriptor, "w", closefd=False)
        super().__init__(io.BufferedWriter(file), encoding="utf-8", errors="replace", line_buffering=True)

    def write(self, text: str, /) -> int:
        super().write(without_secrets(text))
        return len(text)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _redact(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(item, secrets) for item in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, "***")
    return URL_CREDENTIALS.sub("***@", value)
