"""The folder in which a driver keeps what belongs to one run of it: the token of its Ray, sockets of its workers."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "raylhf-"
_LOCK = "in-use"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder that only this user reads. What drivers left that were killed on this machine is removed."""
    _remove_left_over()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        lock = Path(name, "starting")
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            lock.rename(lock.with_name(_LOCK))  # only now: a lock that nobody holds is that of a dead driver
            yield lock.parent


def _remove_left_over() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its driver lives
            shutil.rmtree(folder, ignore_errors=True)
