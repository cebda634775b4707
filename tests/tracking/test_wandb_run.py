import json
import os
import struct
import subprocess
import sys

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as wandb_records

from raylhf.tracking import wandb_run
from raylhf.tracking.tracker import Tracker


def records(run_dir):
    """The records of every offline run in the folder: LevelDB log framing after a 7-byte header, then protobuf."""
    wandb.teardown()  # its process may still be writing after finish()
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, position, payload = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            chunk = data[position + 7 : position + 7 + length]
            payload = chunk if kind in (1, 2) else payload + chunk  # 1 full, 2 first, 3 middle, 4 last
            position += 7 + length
            if kind in (1, 4):
                record = wandb_records.Record()  # pyright: ignore[reportAttributeAccessIssue]
                record.ParseFromString(payload)
                yield record


def items(records_of_a_kind):
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in records_of_a_kind}


def history(run_dir):
    return [items(r.history.item) for r in records(run_dir) if r.WhichOneof("record_type") == "history"]


def metric_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


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
