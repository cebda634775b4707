"""Which worker gets what when workers are lost: the driver's logic alone, with workers that answer by a script."""

from collections import Counter
from typing import Any, cast

import pytest
from driver.scripted_workers import DIED, LOST, Call, scored, scripted_workers, take_finished, well

from raylhf.batch import Prompt
from raylhf.cluster.actors import Outcome, StopRequestedError, Trouble, WorkerError
from raylhf.driver import collect
from raylhf.driver.collect import Collection, hand_over


@pytest.fixture
def collection(monkeypatch):
    """collection(sample=..., score=...) -> the collection, its workers, and the prompts that were issued again."""

    monkeypatch.setattr(collect, "take_finished", take_finished)

    def build(
        sample=well, score=scored, *, num_prompts=6, observing=False, max_resamples=0, max_num_seqs=64, **options
    ):
        workers = scripted_workers(
            sample,
            score,
            rollout={"max_num_seqs": max_num_seqs},
            max_resamples=max_resamples,
            observing=observing,
        )
        reissued: list[int] = []
        prompts = [Prompt(index=10 + i, messages=({"role": "user", "content": "x"},)) for i in range(num_prompts)]
        made = Collection(
            cast(Any, workers),
            prompts,
            num_responses=1,
            seed_key=(0, 7),
            should_stop=options.pop("should_stop", lambda: False),
            on_reissue=lambda place, _worker, _reason: reissued.append(place),
            **options,
        )
        return made, workers, reissued

    return build


def dies_at(death, otherwise):
    """Answers of a pool in which the call number `death` of worker 0's first process kills it."""
    seen = Counter()

    def answer(number, launch, argument, kwargs):
        seen[number, launch] += 1
        if (number, launch) == (0, 1) and seen[0, 1] >= death:
            return Call(DIED), Call(DIED)
        return otherwise(number, launch, argument, kwargs)

    return answer


def test_prompts_go_to_the_worker_with_the_fewest_and_responses_to_all_reward_workers(collection):
    made, workers, reissued = collection()
    groups = made.run()
    assert [number for number, *_ in workers.rollout.calls] == [0, 1, 0, 1, 0, 1]
    assert [number for number, *_ in workers.reward.calls] == [0, 1, 0, 1, 0, 1]
    assert len(groups) == 6 and not reissued


def test_what_a_lost_rollout_worker_had_is_sampled_again_with_the_same_seeds(collection):
    calm = collection()[0].run()
    made, workers, reissued = collection(dies_at(2, well))
    groups = made.run()
    assert [g.rollout_summary["seed"] for g in groups] == [g.rollout_summary["seed"] for g in calm]
    assert len({g.rollout_summary["seed"] for g in groups}) == 6
    assert reissued == [2, 4]  # place 0 was sampled before
    assert workers.rollout.launches == {0: 2, 1: 1}  # replaced once, although two calls failed
    assert len(workers.rollout.calls) == 8


def test_a_lost_reward_worker_costs_no_sample(collection):
    made, workers, reissued = collection(score=dies_at(2, scored))
    assert len(made.run()) == 6
    assert len(workers.rollout.calls) == 6 and not reissued
    assert len(workers.reward.calls) == 8
    assert workers.reward.launches == {0: 2, 1: 1}


def test_where_scores_are_observed_all_are_scored_again_when_a_part_of_what_was_observed_is_lost(collection):
    made, workers, _ = collection(score=dies_at(2, scored), observing=True)
    groups = made.run()
    assert workers.statistics.events == ["drop", "take"]
    assert len(workers.reward.calls) == 8 + 6
    assert len(workers.rollout.calls) == 6 and len(groups) == 6


def test_responses_that_are_lost_with_their_node_are_sampled_again(collection):
    seen = Counter()

    def score(number, launch, rollouts, kwargs):
        seen["calls"] += 1
        return (Call(LOST), Call(LOST)) if seen["calls"] == 3 else scored(number, launch, rollouts, kwargs)

    made, workers, reissued = collection(score=score)
    assert len(made.run()) == 6
    assert reissued == [2] and len(workers.rollout.calls) == 7
    assert workers.rollout.launches == {0: 1, 1: 1}


def test_a_worker_that_raises_ends_the_collection_with_its_name(collection):
    failed = Outcome(trouble=Trouble.FAILED, reason="RuntimeError: no")
    made, _, _ = collection(lambda *_: (Call(failed), Call(failed)))
    with pytest.raises(WorkerError, match=r"rollout 0 \(prompt 10\) failed in rollout and reward: RuntimeError: no"):
        made.run()


def test_a_group_that_asks_for_it_is_sampled_anew_under_another_seed_but_not_for_ever(collection):
    made, workers, reissued = collection(
        score=lambda *args: scored(*args, resample=True), num_prompts=1, max_resamples=2
    )
    (group,) = made.run()
    assert group.num_resamples == 2 and not reissued
    assert len({kwargs["seed"] for *_, kwargs in workers.rollout.calls}) == 3
    assert group.reward_summary["seconds"] == 3.0


def test_a_worker_has_no_more_prompts_than_its_engine_decodes_in_two_waves(collection):
    made, workers, _ = collection(lambda *_: (Call(None), Call(None)), lambda *_: (Call(None), Call(None)),
                                  num_prompts=9, max_num_seqs=2)  # fmt: skip
    with pytest.raises(WorkerError, match=r"no answer from .*rollout 0 \(prompt 10\).* within 0.3 s"):
        made.run()
    assert Counter((number, launch) for number, launch, *_ in workers.rollout.calls if launch == 1) == {
        (0, 1): 4,
        (1, 1): 4,
    }


def test_a_reward_worker_that_hangs_is_replaced_and_named_and_its_responses_are_scored_by_others(collection):
    open_calls, reasons = [], []

    def score(number, launch, rollouts, kwargs):
        if (number, launch) == (1, 1):
            open_calls.append(Call(None))
            return open_calls[-1], open_calls[-1]
        return scored(number, launch, rollouts, kwargs)

    made, workers, reissued = collection(score=score)
    lose = workers.reward.lose_if_current

    def end(ticket, reason):  # as Ray does with the calls of a process that it ends
        reasons.append(reason)
        lose(ticket, reason)
        for call in open_calls:
            call.outcome = DIED

    workers.reward.lose_if_current = end
    assert len(made.run()) == 6
    assert "it hangs: no answer for prompt 11" in reasons[0]
    assert workers.reward.launches[1] == 2 and workers.rollout.launches == {0: 1, 1: 1} and not reissued


def test_a_request_to_stop_ends_the_wait(collection):
    made, _, _ = collection(should_stop=lambda: True)
    with pytest.raises(StopRequestedError):
        made.run()


def test_what_a_learner_cannot_fetch_is_collected_again(collection):
    made, workers, _ = collection()
    answers = iter([[[], [1]], [[], []]])
    held = []

    class Learners:
        def hold(self, lists, *, timeout_s):
            held.append(lists)
            return next(answers)

    def references(groups):
        return [[[g.rollouts for g in groups[rank::2]], [g.rewards for g in groups[rank::2]]] for rank in range(2)]

    groups = hand_over(made, cast(Any, Learners()), references, timeout_s=1.0)
    assert len(workers.rollout.calls) == 7
    assert groups[3].rollouts is not held[0][1][0][1]  # rank 1's second group
    assert groups[3].rollouts is held[1][1][0][1]
    assert groups[2].rollouts is held[0][0][0][1]


def test_what_no_learner_can_fetch_ends_the_run_with_a_sentence(collection):
    made, workers, _ = collection(observing=True)

    class Learners:
        def hold(self, lists, *, timeout_s):
            return [[0]]

    with pytest.raises(WorkerError, match="could not fetch 1 of 6 groups of responses, 3 times in a row"):
        hand_over(made, cast(Any, Learners()), lambda groups: [[[g.rollouts for g in groups]]], timeout_s=1.0)
    # What was observed of the whole batch is dropped before all of it is scored again.
    assert workers.statistics.events == ["take", *["drop", "take"] * 3]


def test_a_slow_reward_does_not_keep_the_engines_waiting(collection):
    made, workers, _ = collection(score=lambda *_: (Call(None), Call(None)), num_prompts=9, max_num_seqs=2)
    with pytest.raises(WorkerError, match="no answer"):
        made.run()
    assert len(workers.rollout.calls) == 9
