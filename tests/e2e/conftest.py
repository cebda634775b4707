import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import SECRETS, Command, CommandLine
from wandb_server import WandbServer, wandb_server


@dataclass
class Watched:
    """A run with secrets in its environment, and what its W&B server was sent."""

    command: Command
    server: WandbServer
    ray_token: str


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


@pytest.fixture(scope="session")
def first(raylhf):
    """The tiny config as it is."""
    return raylhf.run("first")


@pytest.fixture(scope="session")
def watched(raylhf):
    """The same, with secrets in the environment and W&B online, at a server on the loopback."""
    tokens = raylhf.place.glob
    with wandb_server() as server:
        before = set(tokens("raylhf-*/ray-token"))
        command = raylhf.start("second", environment=SECRETS | {"WANDB_BASE_URL": server.url})
        command.wait_for(lambda: any(t.stat().st_size for t in set(tokens("raylhf-*/ray-token")) - before), "token")
        (token,) = set(tokens("raylhf-*/ray-token")) - before
        ray_token = token.read_text()
        command.wait()
    return Watched(command, server, ray_token)


@pytest.fixture(scope="session")
def second(watched):
    return watched.command
