import io
import logging
import re
import sys

from rich.console import Console

from raylhf.tracking.console import LiveConsole, PlainConsole, Progress, build_console, duration


def test_plain_is_one_line_a_step_with_the_change_since_the_first(capsys):
    console = PlainConsole(Progress(num_steps=10, history=[]))
    console.set_phase("rollout")
    console.show_step(1, {"reward/score_mean": 0.5, "policy/kl_to_ref": 0.0, "rollout/tokens_per_s": 812.4})
    console.show_step(2, {"reward/score_mean": 0.75, "policy/kl_to_ref": 0.25, "time/step_s": 3.04})
    phase, first, second = capsys.readouterr().out.splitlines()
    assert phase == "rollout ..."
    assert first == "step 1/10 | reward 0.5 | KL to reference 0 | tokens/s 812.4 | left ?"
    assert second == "step 2/10 | reward 0.75 (+0.25) | KL to reference 0.25 (+0.25) | 3.0 s | left 0:00:00"


def test_the_time_left_follows_the_pace_and_a_step_shown_twice_counts_once(monkeypatch):
    clock = iter([100.0, 160.0, 190.0])
    monkeypatch.setattr("raylhf.tracking.console.time.monotonic", lambda: next(clock))
    progress = Progress(num_steps=10, history=[])
    for step in (0, 1, 1, 2):
        progress.update(step, {})
    assert progress.time_left == "0:06:00"  # (190 - 100) / 2 steps times 8


def test_a_run_that_goes_back_is_timed_anew(monkeypatch):
    clock = iter([100.0, 160.0, 190.0, 200.0])
    monkeypatch.setattr("raylhf.tracking.console.time.monotonic", lambda: next(clock))
    progress = Progress(num_steps=10, history=[])
    for step in (0, 1, 0):
        progress.update(step, {})
    assert progress.time_left == "?"
    progress.update(1, {})
    assert progress.time_left == "0:01:30"


def test_a_resumed_run_is_compared_with_the_first_row_of_its_file(capsys):
    history = [{"step": 0, "eval/score_mean": 0.25}, {"step": 1, "eval/score_mean": None, "reward/score_mean": 1.0}]
    PlainConsole(Progress(num_steps=3, history=history)).show_step(
        2, {"eval/score_mean": 1.0, "reward/score_mean": 0.5}
    )
    assert "reward 0.5 (-0.5) | held-out reward 1 (+0.75)" in capsys.readouterr().out


def test_auto_is_plain_where_stdout_is_no_terminal(capsys):
    assert isinstance(build_console("auto", title="run", num_steps=1, history=[]), PlainConsole)


def test_live_shows_progress_phase_metrics_and_times_and_lets_logs_scroll_by_above(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("a.library")
    logger.addHandler(handler)
    stderr = sys.stderr
    screen = io.StringIO()
    live = LiveConsole(Progress(4, []), "my-run", Console(file=screen, force_terminal=True, width=100))
    try:
        live.set_phase("learn")
        live.show_step(1, {"reward/score_mean": 0.5, "time/learn_s": 2.5})
        live.show_step(2, {"reward/score_mean": 0.75, "time/learn_s": 2.25})
        logger.warning("something [odd] happened")
        print("a worker's line")
    finally:
        live.close("completed")
        logger.removeHandler(handler)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for text in ("my-run", "step 2/4", "completed", "0.75", "+0.25", "learn 2.2 s"):
        assert text in shown, text
    assert "something [odd] happened" in shown
    assert "a worker's line" in shown
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert handler.stream is stderr
    assert sys.stderr is stderr
    assert screen.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


def test_durations_read_as_a_clock():
    assert [duration(s) for s in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]
