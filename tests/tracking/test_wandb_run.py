import base64
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import wandb
from wandb_offline import by_step, history, items, metric_rows, records
from wandb_server import wandb_server

from raylhf.tracking import wandb_run
from raylhf.tracking.tracker import Tracker


def test_an_offline_run_can_be_read_back_and_a_resumed_one_keeps_its_id(tmp_path, run_config):
    config = run_config(wandb="auto", project="my-project", tags=("a-tag",))
    tracker = Tracker(config, tmp_path, None, num_steps=4)
    tracker.log_histogram(1, "reward/score", [0.0, 0.0, 1.0])
    tracker.log(1, {"reward/score_mean": 0.25, "policy/kl_to_ref": 0.5})
    tracker.log_samples(1, [{"response": "Hi", "scores": [1, 2]}, {"response": "Ho", "note": None}])
    tracker.finish("stopped", {"eval/score_mean": 0.75})
    resumed = Tracker(config, tmp_path, 2, num_steps=4)
    resumed.log(2, {"reward/score_mean": 0.5})
    resumed.finish("failed", {})
    wandb.teardown()  # its process may still be writing after finish()

    rows = history(tmp_path)
    assert [(row["step"], row["reward/score_mean"]) for row in rows if "reward/score_mean" in row] == [
        (1, 0.25),
        (2, 0.5),
    ]
    histogram = next(row for row in rows if "reward/score.values" in row)
    assert histogram["step"] == 1
    assert sum(histogram["reward/score.values"]) == 3
    table = next(tmp_path.glob("wandb/offline-run-*/files/media/table/samples/train*.table.json"))
    assert json.loads(table.read_text()) == {
        "columns": ["response", "scores", "note"],
        "data": [["Hi", "[1, 2]", None], ["Ho", None, None]],
    }

    runs = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.display_name, *run.tags) for run in runs} == {
        ((tmp_path / "wandb_id.txt").read_text().strip(), "my-project", "small", "a-tag")
    }
    settings = items(runs[0].config.update)
    assert settings["rollout"]["prompts_per_step"] == 2
    assert settings["reward"]["missing_eos_penalty"] == 1.0
    metrics = [record.metric for record in records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    summaries = [items(r.summary.update) for r in records(tmp_path) if r.WhichOneof("record_type") == "summary"]
    assert {"status": "stopped", "eval/score_mean": 0.75, "step": 1} in [
        {key: summary.get(key) for key in ("status", "eval/score_mean", "step")} for summary in summaries
    ]
    assert [r.exit.exit_code for r in records(tmp_path) if r.WhichOneof("record_type") == "exit"] == [0, 1]
    assert [row["tracking/wandb_errors"] for row in metric_rows(tmp_path)] == [0.0, 0.0]


def test_every_row_of_an_offline_run_is_that_of_the_metrics_file_and_histograms_have_all_values(tmp_path, run_config):
    tracker = Tracker(run_config(wandb="offline"), tmp_path, None, num_steps=4)
    values = {step: np.random.default_rng(step).normal(size=200) for step in (1, 2, 3)}
    for step in values:
        tracker.log(step, {"reward/score_mean": step / 3, "policy/kl_to_ref": 1e-9 * step})
        tracker.log_histogram(step, "reward/score", values[step])
        tracker.log_samples(step, [{"response": "Hi"}])
        tracker.log(step, {"time/save_s": 0.5, "policy/kl_to_ref": float("nan") if step == 2 else 0.25})
    tracker.finish("completed", {})
    wandb.teardown()
    assert by_step(history(tmp_path)) == metric_rows(tmp_path)
    assert [row["policy/kl_to_ref"] for row in metric_rows(tmp_path)] == [0.25, None, 0.25]
    for row in history(tmp_path):
        if "reward/score.bins" in row:
            counts, edges = np.histogram(values[row["step"]], bins=wandb_run.NUM_BINS)
            assert row["reward/score.values"] == counts.tolist()
            np.testing.assert_allclose(row["reward/score.bins"], edges, rtol=1e-12)


def test_an_online_run_sends_its_rows_resumes_under_its_id_and_shows_its_key_to_the_server_alone(
    tmp_path, run_config, monkeypatch
):
    wandb.teardown()  # wandb reads its environment once a process
    key = "0123456789abcdef" * 2 + "01234567"
    config = run_config(wandb="auto", entity="me")
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for resume_step, steps in ((None, (1, 2)), (2, (2, 3))):  # the second one goes back to a checkpoint
            tracker = Tracker(config, tmp_path, resume_step, num_steps=4)
            for step in steps:
                tracker.log_histogram(step, "reward/score", [0.0, step])
                tracker.log(step, {"reward/score_mean": step / 3 + (resume_step or 0)})
            tracker.finish("stopped", {})
        wandb.teardown()
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert {upsert["name"] for upsert in server.upserts()} == {run_id}
    assert [v["name"] for name, v in server.operations if name == "RunResumeStatus"] == [run_id] * 2
    assert server.exit_codes == {run_id: [0, 0]}
    rows = server.history(run_id)
    assert by_step(rows) == metric_rows(tmp_path)
    assert [row["reward/score_mean"] for row in metric_rows(tmp_path)] == [1 / 3, 2 / 3 + 2, 3.0]
    assert metric_rows(tmp_path)[-1]["tracking/wandb_errors"] == 0.0
    internal = [row["_step"] for row in rows]
    assert internal == sorted(set(internal)), "W&B drops rows whose step goes back"
    assert server.keys <= {f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}", f"Bearer {key}", ""}
    assert len(server.keys) > 1 or server.keys != {""}
    assert key.encode() not in server.sent and key not in json.dumps(server.headers)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


def test_without_a_network_an_online_run_goes_on_offline_and_its_key_is_in_no_file(
    tmp_path, run_config, monkeypatch, caplog
):
    wandb.teardown()  # wandb reads its environment once a process
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 2.0)
    tracker = Tracker(run_config(wandb="auto"), tmp_path, None, num_steps=4)
    tracker.log(1, {"reward/score_mean": 0.25})
    tracker.finish("completed", {})
    wandb.teardown()
    sentences = [record.getMessage() for record in caplog.records if record.name == wandb_run.__name__]
    assert len(sentences) == 2
    assert "127.0.0.1:9" in sentences[0]
    assert sentences[0].startswith("W&B could not start online (")
    assert "goes on offline" in sentences[1]
    assert [row["reward/score_mean"] for row in history(tmp_path) if "reward/score_mean" in row] == [0.25]
    assert metric_rows(tmp_path)[0]["tracking/wandb_errors"] == 1.0
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any(key.encode() in file.read_bytes() for file in files)


def test_a_run_outlives_the_death_of_wandbs_own_process(tmp_path, run_config):
    program = f"""
import pathlib, psutil
from raylhf.config import RunConfig
from raylhf.tracking import Tracker
run_dir = pathlib.Path({str(tmp_path)!r})
config = RunConfig.model_validate_json({run_config(wandb="offline").model_dump_json()!r})
tracker = Tracker(config, run_dir, None, num_steps=4)
tracker.log(1, {{"reward/score_mean": 0.25}})
children = psutil.Process().children(recursive=True)
for child in children:
    child.kill()
psutil.wait_procs(children)
for step in (2, 3):
    tracker.log(step, {{"reward/score_mean": 0.5}})
    tracker.log_histogram(step, "reward/score", [1.0])
    tracker.log_samples(step, [{{"response": "Hi"}}])
tracker.finish("completed", {{}})
"""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # a process of its own
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    rows = metric_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["tracking/wandb_errors"] == 0.0 < rows[2]["tracking/wandb_errors"]
    assert run.stderr.count("the run goes on and counts tracking/wandb_errors") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"


@pytest.mark.parametrize(
    ("setting", "key", "mode"),
    [
        ("auto", "", "offline"),
        ("auto", "k", "online"),
        ("online", "", "online"),
        ("offline", "k", "offline"),
    ],
)
def test_auto_is_online_only_where_a_key_is_set(setting, key, mode, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert wandb_run.wandb_mode(setting) == mode


def test_a_run_that_starts_anew_has_a_new_id(tmp_path):
    first = wandb_run.run_id(tmp_path, is_resumed=False)
    assert wandb_run.run_id(tmp_path, is_resumed=True) == first
    assert wandb_run.run_id(tmp_path, is_resumed=False) != first
