"""When the loop saves, evaluates and ends: its logic alone, with the phases replaced by small recorders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raylhf.cluster.actors import StopRequestedError, WorkerError
from raylhf.config import RunConfig
from raylhf.driver import ppo


@pytest.fixture
def loop(monkeypatch):
    """loop(kls, ...) -> (status, events, run): one step for each KL, of which None stands for a stop while sampling."""

    def start(
        kls,
        *,
        budget=None,
        save_every=0,
        evaluate_every=0,
        stop_at=None,
        step=0,
        kl=0.0,
        eval_kl=0.0,
        is_updating=False,
        saved=None,
    ):
        raw: dict[str, Any] = {
            "name": "x",
            "num_steps": len(kls) + step,
            "model": {"path": "tiny"},
            "data": {"path": "p"},
            "rollout": {"prompts_per_step": 8},
            "reward": {"graph": {"kind": "format"}},
            "objective": {"kl": {"budget_per_sequence": budget}},
            "checkpoint": {"every_steps": save_every},
            "evaluation": {"every_steps": evaluate_every},
        }
        run = ppo.Run(
            config=RunConfig.model_validate(raw),
            folder=Path(),
            tracker=cast(Any, SimpleNamespace(set_phase=lambda *_: None, start_is_over=lambda *_: None)),
            fingerprint={},
            should_stop=lambda: stop_at is not None and run.step >= stop_at,
            evaluations=[{"step": step, "metrics": {"eval/kl_to_ref": kl}}] if step else [],
            step=step,
            kl=kl,
            is_updating=is_updating,
        )
        run.ledger = cast(Any, SimpleNamespace(begin=lambda step, next_draw: None))
        run.order = cast(Any, SimpleNamespace(num_drawn=0))
        run.workers = cast(Any, SimpleNamespace(start_seconds={}))
        events: list[str] = []
        remaining = iter(kls)

        def train_step(run):
            if (kl := next(remaining)) is None:
                raise StopRequestedError("rollout")
            if isinstance(kl, Exception):
                raise kl
            run.step += 1
            events.append(f"step {run.step}")
            return kl

        def evaluate_now(run):
            if isinstance(eval_kl, Exception) and run.step:
                raise eval_kl
            run.evaluations.append({"step": run.step, "metrics": {"eval/kl_to_ref": eval_kl}})
            events.append(f"evaluate {run.step}")

        def save(run):
            run.saved_step = run.step
            events.append(f"save {run.step}")
            if saved is not None:
                saved.append(run.step)

        monkeypatch.setattr(ppo, "train_step", train_step)
        monkeypatch.setattr(ppo, "evaluate_now", evaluate_now)
        monkeypatch.setattr(ppo, "save", save)
        monkeypatch.setattr(ppo, "publish_weights", lambda run: events.append(f"publish {run.step}"))
        return ppo.train_ppo(run), events, run

    return start


def test_a_run_publishes_evaluates_before_and_after_and_saves_at_the_end(loop):
    status, events, _ = loop([0.1, 0.2])
    assert status == "complete"
    assert events == ["publish 0", "evaluate 0", "step 1", "step 2", "evaluate 2", "save 2"]


def test_a_stop_saves_what_was_done_and_does_not_evaluate(loop):
    status, events, _ = loop([0.1, 0.2, 0.3], stop_at=1)
    assert (status, events[-2:]) == ("stopped", ["step 1", "save 1"])
    status, events, _ = loop([0.1, None], save_every=1)
    assert (status, events[-2:]) == ("stopped", ["step 1", "save 1"])


def test_passing_the_kl_budget_ends_the_run_and_the_next_one_does_not_go_on(loop):
    status, events, run = loop([1.0, 6.0, 1.0], budget=5)
    assert status == "over KL budget"
    assert events[-3:] == ["step 2", "evaluate 2", "save 2"]
    status, events, _ = loop([1.0], budget=5, step=2, kl=run.kl)
    assert (status, events) == ("over KL budget", ["publish 2"])
    status, events, _ = loop([1.0], budget=9, step=2, kl=run.kl)
    assert (status, events[1]) == ("complete", "step 3")


def test_the_last_updates_kl_counts_although_only_the_evaluation_sees_it(loop):
    assert loop([1.0], budget=5, eval_kl=7.0)[0] == "over KL budget"


def test_evaluations_and_checkpoints_come_at_their_intervals_and_not_twice(loop):
    _, events, _ = loop([0.0] * 4, save_every=2, evaluate_every=2)
    assert events[1:] == [
        "evaluate 0", "step 1", "step 2", "evaluate 2", "save 2", "step 3", "step 4", "evaluate 4", "save 4"
    ]  # fmt: skip


def test_a_failure_outside_of_learning_saves_what_was_learnt(loop):
    saved = []
    for arguments in ({"kls": [0.1, 0.2], "eval_kl": ValueError("no score")}, {"kls": [0.1, WorkerError("gone")]}):
        with pytest.raises((ValueError, WorkerError), match="no score|gone"):
            loop(**arguments, saved=saved)
    assert saved == [2, 1]


def test_a_stop_in_between_two_steps_saves_nothing(loop):
    """Ctrl-C while a step's observations wait for a reward worker: the step is learnt, and not yet accounted for."""
    status, events, _ = loop([0.1, 0.2, None], is_updating=True)
    assert (status, events[-1]) == ("stopped", "step 2")


def test_a_failure_in_between_two_steps_saves_nothing(loop):
    saved = []
    with pytest.raises(WorkerError, match="diverged"):
        loop([0.1, 0.2, WorkerError("diverged")], is_updating=True, saved=saved)
    assert saved == []
