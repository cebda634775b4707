"""What a run does with the folder of an earlier one, before the job begins."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from raylhf.driver import train
from raylhf.driver.scaling import request_size
from raylhf.driver.train import StopRequest, stop_on_signal


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(step of the checkpoint that is there, or None) -> names in the folder when the job runs."""

    def run(step):
        seen: list[str] = []
        job = SimpleNamespace(
            fingerprint={},
            num_steps=5,
            run=lambda *_: seen.extend(file.name for file in tmp_path.iterdir()) or "complete",
            report=lambda *_: None,
            summary=lambda _: {},
        )
        checkpoint = None if step is None else (tmp_path, {"step": step, "settings": {}})
        monkeypatch.setattr(train, "open_job", lambda _: job)
        monkeypatch.setattr(train, "newest_checkpoint", lambda _: checkpoint)
        monkeypatch.setattr(train, "record_settings", lambda *_: None)
        monkeypatch.setattr(train, "Tracker", lambda *_, **__: SimpleNamespace(finish=lambda *_: None))
        config: Any = SimpleNamespace(checkpoint=SimpleNamespace(resume=True))
        assert train._train_in(tmp_path, config) == train.EXIT_OK
        return seen

    return run


def test_what_was_asked_of_an_earlier_run_is_set_aside_by_one_that_begins_anew(start, tmp_path):
    request_size(tmp_path, 4)
    assert start(2) == ["scale.json"]
    assert start(None) == ["scale.1.json"]


def test_a_scheduler_that_takes_the_nodes_away_is_told_from_a_user() -> None:
    stop = StopRequest()
    with stop_on_signal(stop):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signum == signal.SIGUSR1
