"""Where a remote reward is, and the token that opens it."""

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit


def read_token(token_env: str | None, token_file: str | None) -> str | None:
    """The bearer token, None where the settings name none. No error repeats it."""
    if token_env is not None and token_file is not None:
        raise ValueError("the remote reward has token_env and token_file; keep one of them")
    if token_env is not None:
        source, token = f"the environment variable {token_env}", os.environ.get(token_env)
    elif token_file is not None:
        path = Path(token_file)
        source, token = f"the file {token_file}", path.read_text() if path.is_file() else None
    else:
        return None
    if token is None:
        raise ValueError(f"the remote reward's token is missing: this reward worker has not got {source}")
    token = token.strip()
    if not token:
        raise ValueError(f"the remote reward's token is empty: write it into {source}")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"the remote reward's token in {source} has characters that no HTTP header can carry")
    return token


def checked_url(url: str, *, has_token: bool) -> str:
    """The base address without a final slash, refused where it holds a secret or would send the token in the clear."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("the remote reward's url holds a user name or password; use token_env or token_file instead")
    if parts.query or parts.fragment or not parts.hostname:
        raise ValueError(f"the remote reward's url={url!r} must be a base address such as https://host:8000/path")
    if has_token and parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ValueError(
            f"the remote reward would send its token unencrypted to {parts.hostname}; use https, "
            "or a tunnel that ends at 127.0.0.1"
        )
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
