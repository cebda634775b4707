"""What a reward graph remembers, and how workers share it."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from raylhf.rewards.state import Call, RewardState, merge_pending


def committed(*batches, **settings):
    """The moments of one node after these batches."""
    state = RewardState()
    moments = state.register("graph", **settings)
    state.observing = True
    for batch in batches:
        state.observe("graph", np.array(batch, dtype=float))
        state.commit(state.take_pending())
    return moments


def test_the_first_commit_takes_the_batchs_moments_exactly():
    scores = 1e9 + np.random.default_rng(0).normal(size=7)
    moments = committed(scores, decay=0.75)
    assert (moments.mean, moments.variance) == (scores.mean(), scores.var())


def test_later_commits_average_over_scores_whose_weight_decays():
    moments = committed([1.0, 3.0], [5.0, 9.0, 4.0], decay=0.5)
    # Weights 1/2, 1/2, 1, 1, 1.
    weights, scores = np.array([0.5, 0.5, 1, 1, 1]) / 4, np.array([1.0, 3, 5, 9, 4])
    mean = weights @ scores
    assert_allclose([moments.mean, moments.variance], [mean, weights @ (scores - mean) ** 2])


@pytest.mark.parametrize("size", [1, 2, 48])
def test_the_spread_does_not_depend_on_how_many_scores_a_batch_has(size):
    rng = np.random.default_rng(0)
    spreads, moments = [], committed(rng.normal(size=48), decay=0.9)
    for _ in range(400):
        moments.fold(rng.normal(size=size))
        spreads.append(moments.std)
    assert 0.9 < np.mean(spreads[100:]) < 1.05


def test_the_drift_of_the_mean_is_part_of_the_spread():
    assert_allclose(committed([0.0], [10.0], decay=0.999).std, 5.0, rtol=1e-3)


def test_scores_that_become_constant_shrink_the_scale_smoothly_and_to_a_twentieth_at_most():
    moments = committed([-1.0, 1.0], decay=0.9)
    before = moments.std
    for _ in range(1000):
        moments.fold(np.array([0.0]))
        assert 0.5 * before < moments.std <= before
        before = moments.std
    assert before == 0.05
    assert committed(*[[3.0]] * 5, decay=0.9).std == 1.0  # there never was a spread


def test_a_reference_keeps_the_first_batch_for_ever():
    moments = committed([1.0, 3.0], [50.0, 90.0], decay=0.0, is_reference=True)
    assert (moments.mean, moments.std) == (2.0, 1.0)


def test_nothing_is_collected_while_nobody_observes():
    state = RewardState()
    state.register("graph", decay=0.5)
    state.observe("graph", np.array([1.0]))
    assert state.take_pending() == {}


def test_an_empty_batch_leaves_the_moments_alone():
    state = RewardState()
    moments = state.register("graph", decay=0.5)
    state.observing = True
    state.observe("graph", np.array([]))
    state.commit(state.take_pending())
    assert state.needs_commit
    assert (moments.mean, moments.std) == (0.0, 1.0)


def test_what_is_collected_is_taken_once():
    state = RewardState()
    state.register("graph", decay=0.5)
    state.observing = True
    state.observe("graph", np.array([1.0, 3.0]))
    assert state.take_pending() == {"graph": [1.0, 3.0]}
    assert state.take_pending() == {}


def test_the_moments_are_equal_to_the_bit_however_many_workers_saw_the_scores_in_whatever_order():
    values = 1e9 + np.random.default_rng(1).normal(size=30)
    found = set()
    for num_workers in (1, 2, 3):
        order = np.random.default_rng(num_workers).permutation(30)
        collected = []
        for part in np.array_split(values[order], num_workers):
            state = RewardState()
            state.register("graph", decay=0.5)
            state.observing = True
            for chunk in np.array_split(part, 3):
                state.observe("graph", chunk)
            collected.append(state.take_pending())
        driver = RewardState()
        moments = driver.register("graph", decay=0.5)
        driver.commit(merge_pending([*collected, {}]))
        found.add((moments.mean, moments.variance))
    assert len(found) == 1
    ((mean, variance),) = found
    assert_allclose([mean, variance], [values.mean(), values.var()], rtol=1e-6)


def test_a_node_above_another_stateful_one_learns_the_scale_that_it_will_see():
    state = RewardState()
    above, below = state.register("graph", decay=0.5), state.register("graph.parts.a.reward", decay=0.5)
    other = state.register("graph2", decay=0.5)
    state.observing = True
    for place in ("graph", "graph.parts.a.reward", "graph2"):
        state.observe(place, np.array([10.0, 30.0]))
    state.commit(state.take_pending())
    assert (above.num_commits, below.num_commits, other.num_commits) == (0, 1, 1)
    assert state.needs_commit
    state.observe("graph", np.array([-1.0, 1.0]))
    state.commit(state.take_pending())
    assert not state.needs_commit
    assert (above.mean, above.std) == (0.0, 1.0)


def test_a_state_goes_through_json_and_goes_on_where_it_was():
    state, resumed = RewardState(), RewardState()
    for each in (state, resumed):
        each.register("graph", decay=0.5)
    state.observing = resumed.observing = True
    state.observe("graph", np.array([1.0, 4.0]))
    state.commit(state.take_pending())
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert not resumed.needs_commit
    for each in (state, resumed):
        each.observe("graph", np.array([7.0]))
        each.commit(each.take_pending())
    assert resumed.state_dict() == state.state_dict()


def test_the_state_of_another_graph_is_refused_with_the_nodes_that_differ():
    state = RewardState()
    state.register("graph.reward", decay=0.5)
    with pytest.raises(ValueError, match=r"another graph: graph, graph\.reward has running moments"):
        state.load_state_dict({"graph": {}})


def test_a_graph_without_memory_needs_no_commit():
    assert not RewardState().needs_commit
    assert RewardState().state_dict() == {}


def test_calls_that_nobody_takes_do_not_fill_the_memory():
    state = RewardState()
    for i in range(10_005):
        state.record_call(
            Call(str(i), seconds=0.0, num_responses=1, num_failed=0, num_truncated=0, score_mean=0.0, score_std=0.0)
        )
    calls = state.take_calls()
    assert len(calls) == 10_000
    assert calls[-1].source == "10004"
