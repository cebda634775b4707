"""The report on a lost worker."""

from pathlib import Path

import pytest

from raylhf.cluster.actors import Identity, WorkerError, WorkersLostError
from raylhf.cluster.pool import Loss
from raylhf.driver import crash
from raylhf.driver.crash import LAST_LINES, CrashReporter, Moment, report_failure


@pytest.fixture
def reporter(tmp_path, monkeypatch):
    """reporter(kills) -> a reporter, on a machine whose kernel has ended that many processes since it was made."""

    def build(kills=0):
        counts = iter([5])
        monkeypatch.setattr(crash, "out_of_memory_kills", lambda: next(counts, 5 + kills))
        return CrashReporter(tmp_path, tmp_path / "logs", lambda: Moment("rollout", 7, [3, 1, 4]))

    (tmp_path / "logs").mkdir()
    return build


def loss(reason="The actor died", log="logs/rollout-0.log", is_extra=False):
    return Loss("rollout 0", 0, reason, log, Identity("abc", "10.0.0.1", 4711), is_extra)


def test_it_says_who_when_with_what_and_how(reporter, tmp_path):
    (tmp_path / "logs" / "rollout-0.log").write_text("\n".join(f"line {i}" for i in range(100)))
    reporter().worker_lost(loss())
    text = (tmp_path / "crashes" / "001-rollout-0.txt").read_text()
    for part in (
        "rollout 0 (process 4711 on 10.0.0.1)",
        "while the run did: rollout",
        "7 steps were done",
        "prompts: 3, 1, 4",
        "without a last word, as after SIGKILL",
        "The actor died",
        "    line 99",
    ):
        assert part in text
    assert f"line {100 - LAST_LINES}\n" in text and f"line {99 - LAST_LINES}\n" not in text


@pytest.mark.parametrize(
    ("log", "reason", "kills", "expected"),
    [
        ("Fatal Python error: Segmentation fault\n\nThread 0x1", "died", 0, "ended:   SIGSEGV"),
        ("Fatal Python error: Aborted\n", "died", 0, "ended:   SIGABRT"),
        ("", "it did not answer for 61 s: it hangs", 0, "it was silent, and was ended by the driver"),
        ("", "died", 2, "the kernel has ended 2 processes for want of memory"),
        ("", "ray.exceptions.OutOfMemoryError: the node", 0, "Ray's memory monitor ended it"),
    ],
)
def test_it_tells_the_signal_and_hints_at_memory(reporter, tmp_path, log, reason, kills, expected):
    (tmp_path / "logs" / "rollout-0.log").write_text(log)
    reporter(kills).worker_lost(loss(reason))
    assert expected in (tmp_path / "crashes" / "001-rollout-0.txt").read_text()


def test_it_says_whether_another_takes_the_place(reporter, caplog):
    told = reporter()
    told.worker_lost(loss())
    told.worker_lost(loss(is_extra=True))
    replaced, given_up = caplog.messages
    assert "another takes its place" in replaced
    assert "the run goes on without it" in given_up and "takes its place" not in given_up


def test_learners_are_reported_one_by_one_and_a_log_elsewhere_is_no_failure(reporter, tmp_path):
    told = reporter()
    told.learners_lost(WorkersLostError("learner 1 died in learning: gone", ["learner 1"]))
    told.worker_lost(loss())
    assert [file.name for file in sorted((tmp_path / "crashes").iterdir())] == [
        "001-learner-1.txt",
        "002-rollout-0.txt",
    ]


def test_the_kernels_count_is_a_number_here():
    assert crash.out_of_memory_kills() >= 0
    assert crash.last_lines(Path("nowhere")) == []


@pytest.mark.parametrize(
    ("error", "who", "ended"),
    [
        (WorkerError("learner 1 failed in learning: RuntimeError: no"), "learner-1", "it raised an error"),
        (WorkersLostError("learner 0 died in export: gone", ["learner 0"]), "learner-0", "without a last word"),
        (OSError(28, "No space left on device"), "run", "the run ended"),
    ],
)
def test_what_ends_a_run_is_reported_too(tmp_path, error, who, ended):
    file = report_failure(tmp_path, Moment("learn", 3, [8, 9]), error)
    assert file is not None and file.name == f"001-{who}.txt"
    text = file.read_text()
    assert f"ended:   {ended}" in text and "prompts: 8, 9" in text and str(error) in text


def test_a_report_never_takes_the_place_of_another(reporter, tmp_path):
    made = reporter()
    made.worker_lost(loss())
    made.worker_lost(loss())
    (tmp_path / "crashes" / "001-rollout-0.txt").unlink()
    made.worker_lost(loss())
    assert [file.name[:3] for file in sorted((tmp_path / "crashes").iterdir())] == ["002", "003"]


def test_no_secret_reaches_the_report_or_the_warning(reporter, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_API_TOKEN", "hunter2-hunter2")
    (tmp_path / "logs" / "rollout-0.log").write_text("GET https://me:pass@host/x with hunter2-hunter2\n")
    reporter().worker_lost(loss("refused hunter2-hunter2"))
    text = (tmp_path / "crashes" / "001-rollout-0.txt").read_text()
    assert "refused ***" in text and "https://***@host/x with ***" in text
    assert "hunter2" not in text + caplog.text
