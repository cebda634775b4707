"""What a policy run prints at its end."""

from raylhf.config import RunConfig
from raylhf.driver.report import print_report


def evaluation(step, mean):
    metrics = {
        "eval/score_mean": mean,
        "eval/score_se": 0.1,
        "eval/part/tone_mean": mean,
        "eval/part/tone_std": 0.25,
        "eval/kl_to_ref": 1.0,
        "eval/entropy": 2.0,
        "eval/response_length_mean": 3.0,
    }
    return {"step": step, "metrics": metrics, "samples": []}


def test_the_parts_of_the_reward_stand_in_the_table_by_their_means_alone(tmp_path, capsys):
    raw = {
        "name": "x",
        "num_steps": 1,
        "model": {"path": "tiny"},
        "data": {"path": "unused"},
        "rollout": {"prompts_per_step": 1},
        "reward": {"graph": {"kind": "format"}},
    }
    print_report(RunConfig.model_validate(raw), tmp_path, "complete", [evaluation(0, 0.5), evaluation(1, 1.5)])
    shown = capsys.readouterr().out
    assert "tone" in shown and "1.500" in shown
    assert "tone_std" not in shown and "0.250" not in shown
