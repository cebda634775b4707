import subprocess
import sys
import tempfile

import pytest

from raylhf.cluster.private import private_folder

WAITS = """
import sys, tempfile
from raylhf.cluster.private import private_folder
tempfile.tempdir = sys.argv[1]
with private_folder():
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_for_this_user_alone_and_goes_at_the_end(temporary):
    with private_folder() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o077 == 0
    assert list(temporary.iterdir()) == []


def test_what_a_killed_driver_left_is_removed_and_what_a_living_one_uses_stays(temporary):
    command = [sys.executable, "-c", WAITS, str(temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "there\n"
        (theirs,) = temporary.iterdir()
        with private_folder() as ours:
            assert set(temporary.iterdir()) == {theirs, ours}
        other.kill()
        other.wait()
        assert list(temporary.iterdir()) == [theirs]
    with private_folder() as ours:
        assert list(temporary.iterdir()) == [ours]


def test_a_folder_that_is_not_a_drivers_stays(temporary):
    folder = temporary / "raylhf-of-somebody-else"
    folder.mkdir()
    with private_folder():
        assert folder.exists()
