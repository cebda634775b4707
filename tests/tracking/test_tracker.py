import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from raylhf.tracking import startup
from raylhf.tracking.redaction import RedactedStream
from raylhf.tracking.tracker import Tracker


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def tracker_after(config, run_dir, *, steps, resume_step=None):
    """A tracker that logged these steps, one metric and one sample each."""
    tracker = Tracker(config, run_dir, resume_step, num_steps=4)
    for step in steps:
        tracker.log(step, {"reward/score_mean": step / 4})
        tracker.log_samples(step, [{"prompt": f"p{step}", "response": "r", "score": 1.0}])
    return tracker


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path, run_config):
    tracker_after(run_config(), tmp_path, steps=[1, 2])
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/score_mean": 0.25},
        {"step": 2, "reward/score_mean": 0.5},
    ]
    assert rows_of(tmp_path / "samples.jsonl")[0] == {
        "step": 1,
        "name": "train",
        "prompt": "p1",
        "response": "r",
        "score": 1.0,
    }


def test_the_status_file_says_what_the_run_does_now(tmp_path, run_config):
    def status():
        found = json.loads((tmp_path / "status.json").read_text())
        assert found["pid"] == os.getpid() and 0 <= time.time() - found["since"] < 60
        return found["phase"], found["step"]

    tracker = Tracker(run_config(), tmp_path, None, num_steps=4)
    tracker.set_phase("starting workers")
    assert status() == ("starting workers", 0)
    tracker.log(3, {"reward/score_mean": 1.0})
    tracker.set_phase("learn")
    assert status() == ("learn", 3)
    tracker.finish("stopped", {})
    assert status() == ("stopped", 3)


def test_the_start_is_told_once_by_part_in_a_line_and_in_the_row_of_the_step_that_it_led_to(
    tmp_path, run_config, monkeypatch, capsys
):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(startup.time, "time", lambda: clock.now)
    start = startup.StartUp(began=97.5)
    for phase, seconds in {"starting Ray": 2.0, "starting workers": 20.0, "evaluation": 1.5, "other": 0.5}.items():
        start.enter(phase)
        clock.now += seconds
    metrics = start.metrics()
    assert metrics == {
        "time/start_s": 26.5,
        "time/start_program_s": 2.5,
        "time/start_ray_s": 2.0,
        "time/start_workers_s": 20.0,
        "time/start_evaluation_s": 1.5,
    }
    assert startup.start_line({**metrics, "time/start_engine_s": 12.25, "time/start_learner_s": 6.0}) == (
        "first step after 26.5 s: program 2.5, Ray 2.0, workers 20.0 (vLLM engine 12.2, learners 6.0), evaluation 1.5"
    )
    monkeypatch.undo()
    tracker = Tracker(run_config(), tmp_path, None, num_steps=4)
    tracker.set_phase("starting workers")
    tracker.log(0, {"eval/score_mean": 1.0})
    for seconds in (3.0, 4.0):  # the second time is after the learners were lost
        tracker.start_is_over(0, {"time/start_engine_s": seconds})
    (row,) = rows_of(tmp_path / "metrics.jsonl")
    assert row["eval/score_mean"] == 1.0 and row["time/start_engine_s"] == 3.0
    assert row["time/start_s"] >= row["time/start_workers_s"] > 0
    assert capsys.readouterr().out.count("first step after") == 1


def test_everything_of_one_step_is_one_row(tmp_path, run_config):
    tracker = Tracker(run_config(), tmp_path, None, num_steps=4)
    tracker.log_histogram(1, "reward/score", [0.0, 1.0, 2.0, math.nan])
    tracker.log(1, {"reward/score_mean": 1.0, "policy/loss": 0.123456})
    tracker.log(1, {"eval/score_mean": 3, "policy/loss": 0.5})
    tracker.log(2, {"reward/score_mean": np.float32(0.5)})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {
            "step": 1,
            "reward/score_p05": pytest.approx(0.1),
            "reward/score_p50": 1.0,
            "reward/score_p95": pytest.approx(1.9),
            "reward/score_mean": 1.0,
            "policy/loss": 0.5,
            "eval/score_mean": 3.0,
        },
        {"step": 2, "reward/score_mean": 0.5},
    ]


def test_what_is_not_finite_is_null_and_an_empty_histogram_is_no_row(tmp_path, run_config):
    tracker = Tracker(run_config(), tmp_path, None, num_steps=4)
    tracker.log_histogram(1, "reward/score", [math.nan, math.inf])
    assert rows_of(tmp_path / "metrics.jsonl") == []
    tracker.log(1, {"critic/explained_variance": math.nan, "policy/ratio_max": math.inf})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "critic/explained_variance": None, "policy/ratio_max": None}
    ]


def test_a_key_that_the_catalogue_lacks_is_refused_with_the_nearest_one(tmp_path, run_config):
    tracker = Tracker(run_config(), tmp_path, None, num_steps=4)
    with pytest.raises(ValueError, match=r"'policy/clipfrac' is not in .*did you mean 'policy/clip_frac'\?"):
        tracker.log(1, {"policy/clipfrac": 0.1})
    with pytest.raises(ValueError, match=r"'reward/scores' is not in .*did you mean 'reward/score'\?"):
        tracker.log_histogram(1, "reward/scores", [1.0])
    tracker.log(1, {"reward/part/style/length_mean": 0.1, "eval/part/style_mean": 0.2})


def test_a_step_that_goes_back_is_refused(tmp_path, run_config):
    tracker = tracker_after(run_config(), tmp_path, steps=[2])
    with pytest.raises(ValueError, match="step 1 is logged after step 2"):
        tracker.log(1, {"policy/loss": 0.0})


def test_a_resumed_run_has_every_step_once(tmp_path, run_config):
    tracker_after(run_config(), tmp_path, steps=[0, 1, 2, 3])  # killed: never finished
    tracker_after(run_config(), tmp_path, steps=[2, 3, 4], resume_step=2)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [row["prompt"] for row in rows_of(tmp_path / "samples.jsonl")] == ["p0", "p1", "p2", "p3", "p4"]


def test_a_resumed_run_may_add_to_its_last_kept_row(tmp_path, run_config):
    tracker_after(run_config(), tmp_path, steps=[1, 2])
    Tracker(run_config(), tmp_path, 3, num_steps=4).log(2, {"eval/score_mean": 1.0})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/score_mean": 0.25},
        {"step": 2, "reward/score_mean": 0.5, "eval/score_mean": 1.0},
    ]


def test_a_line_that_a_kill_tore_is_cut_off_and_a_broken_one_before_it_is_refused(tmp_path, run_config):
    tracker_after(run_config(), tmp_path, steps=[1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    tracker_after(run_config(), tmp_path, steps=[3], resume_step=3)
    assert [row["step"] for row in rows_of(file)] == [1, 3]
    file.write_text("{broken\n" + file.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not JSON"):
        Tracker(run_config(), tmp_path, 3, num_steps=4)


def test_a_run_that_starts_anew_moves_older_files_aside(tmp_path, run_config):
    for step in (1, 2, 3):
        tracker_after(run_config(), tmp_path, steps=[step])
    files = [tmp_path / name for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")]
    assert [rows_of(file)[0]["step"] for file in files] == [1, 2, 3]


def test_samples_are_as_many_as_the_settings_ask_for(tmp_path, run_config, capsys):
    tracker = Tracker(run_config(samples_per_step=2), tmp_path, None, num_steps=4)
    rows = [{"response": f"answer\n{i}", "scores": np.array([0.5, np.nan])} for i in range(5)]
    tracker.log_samples(1, rows)
    assert capsys.readouterr().out == ""
    tracker.log_samples(1, rows, name="held_out")
    assert capsys.readouterr().out == ""  # the driver's report shows them
    logged = rows_of(tmp_path / "samples.jsonl")
    assert [row["name"] for row in logged] == ["train"] * 2 + ["held_out"] * 3
    assert logged[1] == {"step": 1, "name": "train", "response": "answer\n1", "scores": [0.5, None]}


def test_no_secret_of_the_environment_reaches_a_file(tmp_path, run_config, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "hunter2-hunter2")
    tracker = Tracker(run_config(), tmp_path, None, num_steps=4)
    tracker.log_samples(1, [{"response": "say hunter2-hunter2", "source": ["https://me:pass@host/x"]}])
    tracker.finish("failed", {"error": "no access with hunter2-hunter2"})
    assert rows_of(tmp_path / "samples.jsonl")[0]["response"] == "say ***"
    assert rows_of(tmp_path / "samples.jsonl")[0]["source"] == ["https://***@host/x"]
    assert json.loads((tmp_path / "summary.json").read_text())["error"] == "no access with ***"


def test_what_a_worker_prints_reaches_its_log_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "hunter2-hunter2")
    file = (tmp_path / "worker.log").open("wb")
    stream = RedactedStream(file.fileno())
    print("login with", "hunter2-hunter2", "at https://me:pass@host/x", file=stream)
    assert (tmp_path / "worker.log").read_text() == "login with *** at https://***@host/x\n"
    del stream
    file.write(b"the descriptor is still open\n")
    file.close()


def test_finish_writes_the_summary_once(tmp_path, run_config, capsys):
    tracker = tracker_after(run_config(), tmp_path, steps=[1, 2])
    tracker.finish("completed", {"eval/score_mean": np.float64(0.5), "gain": math.nan})
    tracker.finish("failed", {})
    summary = {"status": "completed", "step": 2, "eval/score_mean": 0.5, "gain": None}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert capsys.readouterr().out.splitlines()[-1] == "completed after step 2/4"


def test_tracking_loads_no_torch():
    program = (
        "import sys, raylhf.tracking, raylhf.tracking.wandb_run\n"
        "assert not {'torch', 'transformers', 'vllm', 'ray', 'deepspeed'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
