"""One driver a run's folder."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from raylhf.driver.folder import locked

HOLD = """
import subprocess, sys, time
from pathlib import Path
from raylhf.driver.folder import locked

with locked(Path(sys.argv[1])):
    worker = subprocess.Popen(["sleep", "60"])  # outlives its parent, and must not hold the lock
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_by_name_until_the_first_is_gone_however_it_went(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        sentence = rf"run mine is being trained by process {holder.pid} on {socket.gethostname()}; stop it .*name="
        with pytest.raises(ValueError, match=sentence), locked(folder):
            raise AssertionError("two drivers")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(folder):
            assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    finally:
        holder.kill()
        holder.stdout.close()
        os.kill(worker, signal.SIGKILL)


def test_the_lock_is_free_again_after_the_block_and_after_an_error_in_it(tmp_path):
    with locked(tmp_path):
        pass
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path), pytest.raises(ValueError, match="is being trained"), locked(tmp_path):
        raise AssertionError("two drivers")


def test_a_file_system_without_locks_is_told_of_and_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available); start no second driver" in capsys.readouterr().err
