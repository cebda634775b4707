"""Bad input ends with a sentence or is skipped and counted; nothing hangs, and nothing is left behind."""

import json

import pytest
from command_line import TEST_S

pytestmark = pytest.mark.timeout(TEST_S)
NUM_STEPS = 3
MODULE = """
calls = {}


def score(prompt, response, metadata):
    if metadata["mood"] == "raise":
        raise KeyError("no such thing")
    if metadata["mood"] == "nan":
        return float("nan")
    calls[prompt] = calls.get(prompt, 0) + 1
    if metadata["mood"] == "half" and calls[prompt] % 2 == 0:
        return None
    return (1 + len(set(response))) / 17


def never(prompt, response, metadata):
    raise RuntimeError("the scoring service is down")
"""
MOODS = ("fine", "raise", "fine", "nan", "half", "raise", "fine", "fine")
NUM_INVALID = 2 * (MOODS.count("raise") + MOODS.count("nan")) + MOODS.count("half")


def write_prompts(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={file}"


@pytest.fixture
def with_module(tmp_path):
    (tmp_path / "moody.py").write_text(MODULE)
    return {"PYTHONPATH": str(tmp_path)}


def test_invalid_scores_and_overlong_prompts_are_counted_and_skipped(raylhf, tmp_path, with_module):
    rows = [{"prompt": f"Prompt {i}", "mood": mood} for i, mood in enumerate(MOODS)]
    rows.insert(3, {"prompt": "far too long " * 10, "mood": "fine"})
    run = raylhf.run(
        "invalid",
        write_prompts(tmp_path / "prompts.jsonl", rows),
        "reward.graph={kind: function, path: 'moody:score'}",
        f"num_steps={NUM_STEPS}",
        "data.held_out=0",
        f"rollout.prompts_per_step={len(MOODS)}",
        f"tracking.samples_per_step={len(MOODS)}",
        "objective.advantage=grpo",
        "objective.critic={}",
        "learner.lora={rank: 4}",
        "learner.micro_batch_tokens=640",
        environment=with_module,
    )
    assert run.process.returncode == 0, run.story()
    assert run.left_running() == []
    start, *steps = run.rows()
    assert start.keys() >= {"time/start_s"}, (
        "without held-out prompts, there is nothing else to tell before the first step"
    )
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    for row in steps:
        assert row["reward/invalid_count"] == row["data/dropped_responses_count"] == NUM_INVALID
        assert row["data/dropped_overlong_count"] == 1
        assert 0 < row["reward/score_mean"] <= 1
        assert row["mismatch/abs_dlogprob_mean"] < 1e-3
    assert steps[-1]["policy/kl_to_ref"] > 0
    scores = [row["score"] for row in run.rows("samples.jsonl")]
    assert scores.count(None) == NUM_STEPS * (MOODS.count("raise") + MOODS.count("nan"))
    assert 0.0 not in scores, "an invalid score must not look like a bad answer"


def test_a_batch_without_a_single_valid_score_stops_the_run_and_names_the_reason(raylhf, with_module):
    run = raylhf.run("none_valid", "reward.graph={kind: function, path: 'moody:never'}", environment=with_module)
    assert run.process.returncode == 2, run.story()
    assert "no response of the batch got a valid score" in run.errors
    assert "RuntimeError: the scoring service is down" in run.errors
    assert "Traceback" not in run.errors
    assert run.left_running() == []


def refused(raylhf, name, *overrides):
    """The sentences with which a run ends before it starts an engine."""
    run = raylhf.run(name, *overrides)
    assert run.process.returncode == 2, run.story()
    assert "Traceback" not in run.errors
    assert run.left_running() == []
    assert not run.rows()
    return run.errors


def test_a_malformed_line_of_prompts_is_named(raylhf, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n\n{"prompt": "cut off\n')
    assert f"{file}, line 3: not a JSON object" in refused(raylhf, "malformed", f"data.path={file}")


def test_an_empty_file_of_prompts_is_refused(raylhf, tmp_path):
    (tmp_path / "prompts.jsonl").touch()
    assert "holds no prompts" in refused(raylhf, "empty", f"data.path={tmp_path / 'prompts.jsonl'}")


def test_a_missing_model_folder_is_refused(raylhf, tmp_path):
    errors = refused(raylhf, "no_folder", f"model.path={tmp_path / 'nothing'}")
    assert f"model.path '{tmp_path / 'nothing'}' does not exist" in errors


def test_a_model_that_cannot_be_reached_is_refused(raylhf):
    errors = refused(raylhf, "unreachable", "model.path=nobody/such-a-model")
    assert "model 'nobody/such-a-model' cannot be loaded" in errors


def test_prompts_that_are_all_too_long_are_refused(raylhf, tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "far too long " * 10}] * 20)
    assert "all 16 prompts are longer than data.max_prompt_tokens=64" in refused(raylhf, "overlong", path)
