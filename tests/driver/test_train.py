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


def test_a_full_disk_ends_the_run_with_a_sentence_and_a_report(tmp_path, monkeypatch, capsys):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "newest_checkpoint", lambda _: None)
    monkeypatch.setattr(train, "record_settings", lambda *_: None)
    tracker = SimpleNamespace(finish=lambda *_: None, phase="rollout", step=4)
    monkeypatch.setattr(train, "Tracker", lambda *_, **__: tracker)
    job = SimpleNamespace(fingerprint={}, num_steps=5, run=fill, summary=lambda _: {}, rows_under_way=lambda: [7])
    monkeypatch.setattr(train, "open_job", lambda _: job)
    config: Any = SimpleNamespace(checkpoint=SimpleNamespace(resume=True))
    assert train._train_in(tmp_path, config) == train.EXIT_FAILED
    told = capsys.readouterr().err
    assert "No space left on device" in told and "GiB of the disk" in told and "newest checkpoint" in told
    assert "prompts: 7" in (tmp_path / "crashes" / "001-run.txt").read_text()
