import shutil
import tempfile
from pathlib import Path

import pytest
from command_line import CommandLine


@pytest.fixture(scope="session")
def raylhf():
    """`raylhf.run(name, "key=value", ...)` on the tiny config. What still runs at the end of the session is killed."""
    # Right under /tmp: Ray keeps sockets below it, whose paths may have 107 characters.
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    commands = CommandLine(place)
    yield commands
    for command in commands.commands:
        command.kill()
    shutil.rmtree(place)
