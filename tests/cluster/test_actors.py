"""What the driver makes of calls that ended badly, and what workers leave in their logs."""

import os
import subprocess
import sys

import pytest

from raylhf.cluster.actors import Outcome, Trouble, WorkerError, WorkersLostError, raise_trouble

LOST = Outcome(trouble=Trouble.LOST_DATA, reason="its node is gone")
FAILED = Outcome(trouble=Trouble.FAILED, reason="RuntimeError: connection closed by peer")


def test_an_answer_that_is_lost_with_its_node_is_a_lost_worker_which_others_only_lost_contact_with():
    with pytest.raises(WorkersLostError, match="the answer of learner 0 in learning is lost") as caught:
        raise_trouble({"learner 1": FAILED, "learner 0": LOST}, "learning")
    assert caught.value.names == ("learner 0",)


def test_a_worker_that_raises_is_not_lost():
    with pytest.raises(WorkerError, match="learner 1 failed in learning") as caught:
        raise_trouble({"learner 1": FAILED, "learner 0": Outcome({})}, "learning")
    assert not isinstance(caught.value, WorkersLostError)


def test_what_a_worker_prints_or_raises_reaches_its_log_without_secrets(tmp_path):
    program = "import os, sys, pathlib; from raylhf.cluster.actors import _log_to; _log_to(pathlib.Path(sys.argv[1]))"
    program += "; print('login with', os.environ['SCORES_PASSWORD']); raise ValueError(os.environ['SCORES_PASSWORD'])"
    environment = {**os.environ, "SCORES_PASSWORD": "zebra-crossing-nineteen"}
    log = tmp_path / "worker.log"
    subprocess.run([sys.executable, "-c", program, str(log)], env=environment, timeout=60, check=False)
    assert "login with ***\n" in log.read_text() and "ValueError: ***\n" in log.read_text()
    assert "zebra" not in log.read_text()


START_A_WORKER = """
import asyncio, gc, sys
from raylhf.cluster.actors import _AsyncHost, _Host
class Worker:
    def ping(self): pass
    start = ping
host = {"host": _Host, "async host": _AsyncHost}[sys.argv[1]](None, Worker, (), {})
for method in ("ping", "start"):
    answer = host.call(method)
    if asyncio.iscoroutine(answer):
        asyncio.run(answer)
    print(gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize("host", ["host", "async host"])
def test_garbage_collection_leaves_alone_what_a_worker_has_when_it_is_up(host):
    command = [sys.executable, "-c", START_A_WORKER, host]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed.split() == ["False", "True"]
