"""What a run on stored judgements knows before anything starts."""

import json

import pytest

from raylhf.config.run import PreferenceRunConfig
from raylhf.driver.offline import OfflineJob


def job_of(path, rows, **data):
    """The job of DPO on these rows, two prompts in a step."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"path": str(path), "kind": "scores", "held_out": 0, **data},
        "objective": {"kind": "preference", "batch_size": 2, "num_epochs": 3},
    }
    return OfflineJob(PreferenceRunConfig.model_validate(raw))


def scored(prompt, *scores):
    return {"prompt": prompt, "responses": [str(i) for i in range(len(scores))], "scores": scores}


def test_steps_are_counted_over_prompts_that_can_be_learnt_from(tmp_path):
    rows = [scored(f"p{i}", 1.0, float(i % 2)) for i in range(8)]  # every second prompt is a tie
    job = job_of(tmp_path / "rows.jsonl", rows)
    assert job.num_steps == 3 * (4 // 2)


def test_a_held_out_part_of_ties_is_not_measured_on(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(scored("q", 1.0, 1.0)) + "\n")
    job = job_of(tmp_path / "rows.jsonl", [scored("p", 1.0, 0.0)], held_out_path=str(held_out))
    assert job.num_steps == 3


def test_nothing_but_ties_is_told_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.path holds nothing for dpo: none of its 2 training prompts"):
        job_of(tmp_path / "rows.jsonl", [scored("p", 1.0, 1.0), scored("q", 0.0, 0.0)])
