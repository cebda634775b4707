"""Keeps credentials out of what is logged."""

import os
import re
from typing import Any

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
MIN_SECRET_LENGTH = 8
"""Shorter values are ordinary words too often."""


def without_secrets(value: Any) -> Any:
    """`value` with credentials in URLs, and the values of secret environment variables, replaced by ***.

    A variable is secret when its name ends in KEY, TOKEN, SECRET or PASSWORD. Lists and dicts are walked.
    """
    secrets = [v for name, v in os.environ.items() if SECRET_NAME.search(name) and len(v) >= MIN_SECRET_LENGTH]
    return _redact(value, secrets)


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
