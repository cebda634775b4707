"""A reward model's loop: when it evaluates, saves and ends, with learners and tracker replaced by small recorders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from raylhf.config.run import RewardModelRunConfig
from raylhf.driver import offline
from raylhf.driver.job import RunContext


class Learners:
    """Notes what is called; what it answers needs no model."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def call_all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        self.calls.append(method)
        return [{"metrics": {"rm_eval/loss": 1.0}, "samples": []} if method == "evaluate" else {}]


def run_of(num_steps: int, folder: Path, **sections: Any) -> tuple[offline.OfflineRun, Learners]:
    config = RewardModelRunConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "tiny"},
            "data": {"path": "p", "kind": "pairs"},
            "objective": {"kind": "reward_model", "loss": {"kind": "bradley_terry"}},
            **sections,
        }
    )
    learners = Learners()
    nothing = lambda *args, **kwargs: None  # noqa: E731
    tracker = SimpleNamespace(set_phase=nothing, log=nothing, log_samples=nothing)
    context = RunContext(folder, cast(Any, tracker), {}, lambda: False, [])
    return offline.OfflineRun(config, context, cast(Any, learners), num_steps, has_held_out=True), learners


def test_an_evaluation_and_a_checkpoint_of_one_step_come_in_this_order(tmp_path, monkeypatch):
    states: list[list[int]] = []

    def commit(folder: Path, *, step: int, state: dict[str, Any], keep: int) -> None:
        states.append([evaluation["step"] for evaluation in state["evaluations"]])

    monkeypatch.setattr(offline, "commit_checkpoint", commit)
    run, learners = run_of(4, tmp_path, checkpoint={"every_steps": 2}, evaluation={"every_steps": 2})
    assert run.train() == "complete"
    half = ["update", "update", "evaluate", "save"]
    assert learners.calls == ["evaluate", *half, *half]
    assert states == [[0, 2], [0, 2, 4]]


def test_the_last_step_is_evaluated_and_saved_once_whatever_the_intervals(tmp_path):
    run, learners = run_of(3, tmp_path, checkpoint={"every_steps": 2}, evaluation={"every_steps": 2})
    assert run.train() == "complete"
    assert learners.calls == ["evaluate", "update", "update", "evaluate", "save", "update", "evaluate", "save"]
    run, learners = run_of(2, tmp_path / "ends_only")
    assert run.train() == "complete"
    assert learners.calls == ["evaluate", "update", "update", "evaluate", "save"]


def test_the_summary_leaves_out_a_loss_that_an_evaluation_lacks():
    job = object.__new__(offline.OfflineJob)
    job._config = run_of(1, Path("nowhere"))[0].config
    first, last = {"metrics": {"rm_eval/accuracy": 0.5}}, {"metrics": {"rm_eval/loss": 0.25}}
    assert job.summary([]) == {}
    assert job.summary([first, last]) == {"rm_eval/loss_last": 0.25}
    assert job.summary([last, first, last]) == {"rm_eval/loss_first": 0.25, "rm_eval/loss_last": 0.25}
