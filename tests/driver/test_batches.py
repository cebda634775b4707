"""Which batches are on their way when: asynchronous mode, with workers that answer by a script."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from driver.scripted_workers import DIED, Call, scored, scripted_workers, take_finished, well

from raylhf.batch import Prompt
from raylhf.cluster.actors import Outcome, Trouble, WorkerError
from raylhf.driver import collect
from raylhf.driver.batches import BatchQueue
from raylhf.text.prompts import PromptOrder

SIZE = 4
WHITENED = {"kind": "whiten", "reward": {"kind": "format"}}


@pytest.fixture
def queue(monkeypatch):
    """queue(max_staleness=..., ...) -> the queue, its workers, and what the ledger was told."""
    monkeypatch.setattr(collect, "take_finished", take_finished)

    def build(max_staleness, *, sample=well, score=scored, num_steps=10, **options):
        rollout = {"prompts_per_step": SIZE, "max_staleness": max_staleness}
        workers = scripted_workers(sample, score, rollout=rollout, num_steps=num_steps, **options)
        prompts = [Prompt(index=i, messages=({"role": "user", "content": "x"},)) for i in range(100)]
        order = PromptOrder(prompts, seed=0, shuffle=False)
        issued: dict[int, list[int]] = {}
        ledger = SimpleNamespace(
            issue=lambda step, draws: issued.update({step: list(draws)}), reissue=lambda draws, worker, reason: None
        )
        return BatchQueue(cast(Any, workers), order, cast(Any, ledger), lambda: False), workers, issued

    return build


def learn_from(batches, step):
    batch = batches.open(step)
    groups = batch.collection.run(ahead=batches.ahead())
    batches.note_finished()
    batches.close(batch)
    return groups


def test_without_staleness_a_batch_is_drawn_when_its_step_begins(queue):
    batches, workers, issued = queue(0)
    for step in range(3):
        batch = batches.open(step)
        assert batches.ahead() == []
        assert sorted(issued) == list(range(1, step + 2))
        assert batches.position()["position"] == step * SIZE
        batch.collection.run()
        batches.advance()  # nothing to go on with
        assert len(workers.rollout.calls) == (step + 1) * SIZE
        batches.note_finished()
        batches.close(batch)
        assert batches.position()["position"] == (step + 1) * SIZE


def test_prompts_are_counted_by_the_stage_that_they_are_at(queue):
    def sample(number, launch, argument, kwargs):  # the second batch comes in part: its third prompt is never sampled
        return (Call(None), Call(None)) if argument.index == 6 else well(number, launch, argument, kwargs)

    def score(number, launch, rollouts, kwargs):  # and no score of its own ever comes
        return (
            scored(number, launch, rollouts, kwargs) if len(workers.reward.calls) <= SIZE else (Call(None), Call(None))
        )

    batches, workers, _ = queue(1, sample=sample, score=score)
    assert batches.stages() == {}
    batch = batches.open(0)
    assert batches.stages() == {"waiting": 2 * SIZE}
    batch.collection.run(ahead=batches.ahead())
    batches.advance()
    assert batches.stages() == {"scored": SIZE, "sampling": 1, "scoring": SIZE - 1}
    batches.note_finished()
    batches.close(batch)
    assert batches.stages() == {"sampling": 1, "scoring": SIZE - 1}


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_no_more_is_given_out_than_the_bound_admits(queue, max_staleness):
    batches, workers, issued = queue(max_staleness)
    for version in range(4):
        batch = batches.open(version)
        assert len(batches.ahead()) == max_staleness
        batch.collection.run(ahead=batches.ahead())
        for _ in range(3):
            batches.advance()
        assert len(workers.rollout.calls) == (max_staleness + version + 1) * SIZE
        assert max(issued) == version + 1 + max_staleness
        batches.note_finished()
        batches.close(batch)


def test_the_batches_are_those_of_the_synchronous_run_with_the_same_seeds_in_the_same_order(queue):
    def seeds(max_staleness):
        batches, _, issued = queue(max_staleness)
        found = [[g.rollout_summary["seed"] for g in learn_from(batches, step)] for step in range(5)]
        return found, [issued[step] for step in range(1, 6)]

    assert seeds(0) == seeds(2)


def test_nothing_is_drawn_for_steps_behind_the_last(queue):
    batches, workers, issued = queue(5, num_steps=3)
    for step in range(3):
        learn_from(batches, step)
    assert sorted(issued) == [1, 2, 3] and len(workers.rollout.calls) == 3 * SIZE


def test_a_checkpoint_draws_on_at_the_first_prompt_that_is_not_learnt_from(queue):
    batches, _, issued = queue(2)
    learn_from(batches, 0)
    batches.open(1)
    assert issued[4] == [12, 13, 14, 15]
    assert batches.position()["position"] == SIZE
    batches.clear()
    assert batches.ahead() == []


def test_a_reward_that_keeps_statistics_scores_a_batch_in_its_own_step(queue):
    batches, workers, _ = queue(1, graph=WHITENED)
    batch = batches.open(0)
    batch.collection.run(ahead=batches.ahead())
    for _ in range(3):
        batches.advance()
    assert len(workers.rollout.calls) == 2 * SIZE and len(workers.reward.calls) == SIZE
    batches.note_finished()
    batches.close(batch)
    learn_from(batches, 1)
    assert len(workers.reward.calls) == 2 * SIZE


def test_a_worker_that_is_lost_while_the_learners_learn_costs_no_prompt(queue):
    def sample(number, launch, argument, kwargs):
        if (number, launch) == (1, 1) and len(workers.rollout.calls) > SIZE:
            return Call(DIED), Call(DIED)
        return well(number, launch, argument, kwargs)

    batches, workers, _ = queue(1, sample=sample)
    batches.open(0).collection.run()  # with nothing ahead
    for _ in range(3):
        batches.advance()
    assert workers.rollout.launches[1] == 2
    (ahead,) = batches.ahead()
    assert ahead.is_done
    assert len(ahead.run()) == SIZE


def test_what_goes_wrong_while_the_learners_learn_is_told_of_after_the_step(queue):
    failed = Outcome(trouble=Trouble.FAILED, reason="RuntimeError: no")

    def sample(number, launch, argument, kwargs):
        is_ahead = len(workers.rollout.calls) > SIZE
        return (Call(failed), Call(failed)) if is_ahead else well(number, launch, argument, kwargs)

    batches, workers, _ = queue(1, sample=sample)
    batches.open(0).collection.run()
    for _ in range(3):
        batches.advance()
    with pytest.raises(WorkerError, match="RuntimeError: no"):
        batches.raise_problem()
    batches.raise_problem()  # once is enough


def test_the_time_of_a_batch_begins_when_the_one_before_it_was_complete(queue, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raylhf.driver.batches.time.monotonic", lambda: now[0])
    batches, _, _ = queue(1)
    first = batches.open(0)
    now[0] = 107.0
    first.collection.run(ahead=())
    batches.note_finished()
    assert batches.seconds(first) == 7.0
    now[0] = 110.0
    for _ in range(3):
        batches.advance()  # while the learners learn
    now[0] = 120.0
    batches.close(first)
    second = batches.open(1)
    assert second.finished_at == 110.0
    assert batches.seconds(second) == 3.0


def test_batches_that_are_found_complete_at_once_still_have_a_rate(queue, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raylhf.driver.batches.time.monotonic", lambda: now[0])
    batches, _, _ = queue(1)
    for step in range(2):
        batch = batches.open(step)
        now[0] += 5.0
        batch.collection.run(ahead=batches.ahead())
        for collection in batches.ahead():
            collection.run()
        batches.note_finished()
        assert batches.seconds(batch) == (5.0 if step == 0 else 0.0)
        assert batches.cycle_seconds(batch) == 5.0
        batches.close(batch)
