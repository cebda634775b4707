"""Nodes of the reward graph, over rewards with given scores."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from raylhf.batch import RewardOutput
from raylhf.rewards.fusion import kl_dro, lower_confidence, tchebycheff, weighted_sum, worst_case
from raylhf.rewards.nodes import Adaptive, Combine
from raylhf.rewards.selection import Gate, Route
from raylhf.rewards.source import Source
from raylhf.rewards.state import RewardState, merge_pending
from raylhf.rewards.transforms import Calibrate, Clip, Veto, Whiten
from raylhf.rewards.validity import RewardFailedError

NAN = np.nan


def weighted(**parts):
    """A sum of `name=(weight, reward)`."""
    weights = [weight for weight, _ in parts.values()]
    return Combine({name: reward for name, (_, reward) in parts.items()}, partial(weighted_sum, weights=weights))


def by_member(parts, combine):
    """A node over the members of its parts."""
    return Combine(parts, combine, by_member=True)


def gate(parts, weights, *, key=None, rules=(), classifier=None):
    return Gate(parts, weights, weights_key=key, rules=rules, classifier=classifier)


def route(parts, *, key=None, rules=(), default=None):
    return Route(parts, key=key, rules=rules, default=default)


def parts_of(output):
    return {name: scores.tolist() for name, scores in output.parts.items()}


# --- sums and members ------------------------------------------------------------------------------------------------


def test_a_sum_weighs_its_parts_and_names_nested_ones_with_a_slash(given, rollouts_of):
    style = weighted(b=(2.0, given(0.5, 0.75)))
    output = weighted(a=(3.0, given(0.5, 0.25)), style=(0.5, style)).score(rollouts_of("", ""))
    assert output.scores.tolist() == [2.0, 1.5]
    assert parts_of(output) == {"a": [0.5, 0.25], "style": [1.0, 1.5], "style/b": [0.5, 0.75]}


def test_a_sum_is_invalid_where_any_part_is_and_passes_the_sentences_on(given, rollouts_of):
    first = given(1.0, NAN, 3.0, errors=("rule: prompt 11: no",))
    second = given(4.0, 5.0, NAN, errors=("judge: prompt 12: no",))
    output = weighted(x=(1.0, first), y=(-1.0, second)).score(rollouts_of("", "", ""))
    assert output.valid.tolist() == [True, False, False]
    assert_array_equal(output.scores, [-3.0, NAN, NAN])
    assert output.errors == ("x: rule: prompt 11: no", "y: judge: prompt 12: no")


def test_a_weight_of_zero_does_not_hide_a_failure(given, rollouts_of):
    output = weighted(x=(0.0, given(NAN)), y=(1.0, given(2.0))).score(rollouts_of("a"))
    assert not output.valid.any()
    assert np.isnan(output.scores).all()


def test_the_worst_case_counts_an_ensemble_by_its_members_and_other_parts_by_their_score(given, rollouts_of):
    ensemble = given(2.0, 2.0, vector=[[1.0, 3.0], [NAN, 2.0]], vector_names=("m0", "m1"))
    output = by_member({"ensemble": ensemble, "rule": given(1.5, 5.0)}, worst_case).score(rollouts_of("", ""))
    assert output.scores.tolist() == [1.0, 2.0]
    assert output.vector is None


def test_a_sum_counts_an_ensemble_by_its_score(given, rollouts_of):
    ensemble = given(2.0, vector=[[1.0, 3.0]], vector_names=("m0", "m1"))
    assert weighted(ensemble=(2.0, ensemble), rule=(1.0, given(1.0))).score(rollouts_of("")).scores.tolist() == [5.0]


def test_a_part_that_failed_is_not_left_out_as_a_member_that_does_not_apply_is(given, rollouts_of):
    ensemble = given(2.0, NAN, NAN, vector=[[2.0, NAN], [NAN, NAN], [NAN, NAN]], vector_names=("m0", "m1"))
    node = by_member({"ensemble": ensemble, "rule": given(3.0, 3.0, NAN)}, worst_case)
    assert_array_equal(node.score(rollouts_of("", "", "")).scores, [2.0, NAN, NAN])


def test_an_ensemble_of_one_is_its_member_in_a_confidence_bound(given, rollouts_of):
    alone = given(2.0, vector=[[2.0]], vector_names=("m0",))
    assert by_member({"e": alone}, partial(lower_confidence, coef=3.0)).score(rollouts_of("")).scores.tolist() == [2.0]


def test_rows_that_a_part_wants_sampled_anew_are_asked_for_by_every_node_above(given, rollouts_of):
    asking = given(1.0, NAN, 1.0, resample=[False, True, False])
    inner = weighted(a=(1.0, asking), b=(1.0, given(1.0, 1.0, NAN, resample=[False, False, True])))
    output = Clip(weighted(inner=(1.0, inner), c=(1.0, given(1.0, 1.0, 1.0))), low=0, high=9).score(rollouts_of(*"abc"))
    assert output.resample is not None
    assert output.resample.tolist() == [False, True, True]
    assert weighted(c=(1.0, given(1.0))).score(rollouts_of("a")).resample is None


def test_normalising_before_the_sum_gives_each_source_its_say_and_after_it_does_not(given, rollouts_of):
    # The oracle divides by the sample deviation plus 1e-4, the running moments are of the population.
    rollouts, ddof = rollouts_of("", "", "", ""), np.sqrt(3 / 4)
    r1, r2 = given(1.0, 1.0, 0.0, 0.0), given(0.0, 10.0, 0.0, 10.0)
    state = RewardState()
    after = Whiten(weighted(a=(1.0, r1), b=(1.0, r2)), place="after", state=state)
    before = weighted(
        a=(1.0, Whiten(r1, place="a", state=state)),
        b=(1.0, Whiten(r2, place="b", state=state)),
    )
    state.observing = True
    after.score(rollouts)
    before.score(rollouts)
    state.commit(state.take_pending())
    assert_allclose(after.score(rollouts).scores * ddof, [-0.775541, 0.947884, -0.947884, 0.775541], atol=1e-4)
    assert_allclose(before.score(rollouts).scores * ddof, [-0.000135, 1.731886, -1.731886, 0.000135], atol=3e-4)


# --- token scores ----------------------------------------------------------------------------------------------------


def test_dense_scores_are_summed_with_the_weights_and_the_rest_stands_on_the_last_token(given, rollouts_of):
    rollouts = rollouts_of("ab", "")  # three tokens and one
    x = given(6.0, 3.0, token_scores=[[1, 2, 3], [3]])
    y = given(1.0, 1.0, token_scores=[[1, 0, 0], [1]])
    output = weighted(x=(2.0, x), y=(-1.0, y), z=(10.0, given(0.5, 0.25))).score(rollouts)
    assert output.scores.tolist() == [16.0, 7.5]
    assert output.token_scores is not None
    assert [row.tolist() for row in output.token_scores] == [[1.0, 4.0, 11.0], [7.5]]


def test_the_worst_case_credits_the_tokens_of_the_worst_part_alone(given, rollouts_of):
    x = given(3.0, 1.0, token_scores=[[1, 2], [0, 1]])
    y = given(2.0, 5.0, token_scores=[[2, 0], [5, 0]])
    output = by_member({"x": x, "y": y}, worst_case).score(rollouts_of("a", "b"))
    assert output.token_scores is not None
    assert [row.tolist() for row in output.token_scores] == [[2.0, 0.0], [0.0, 1.0]]


def test_a_graph_without_dense_scores_has_none(given, rollouts_of):
    nested = Clip(weighted(a=(1.0, given(1.0))), low=0, high=2)
    assert Veto(nested, given(1.0), rule_name="rule", below=0.5, cap=0).score(rollouts_of("a")).token_scores is None


def random_dense(given, rng, lengths, **settings):
    rows = [rng.normal(size=length) for length in lengths]
    return given(*[row.sum() for row in rows], token_scores=rows, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_through_any_nesting_each_valid_row_of_token_scores_sums_to_its_score(seed, given, rollouts_of):
    rng = np.random.default_rng(seed)
    rollouts = rollouts_of(*["x" * n for n in rng.integers(0, 9, size=8)], questions=["math", "chat"] * 4)
    lengths, state = rollouts.response_lengths, RewardState()
    a, b, c = (random_dense(given, rng, lengths) for _ in range(3))
    b._scores[2], b._valid[2] = NAN, False
    flat = given(*rng.normal(size=8))
    vector = given(*rng.normal(size=8), vector=rng.normal(size=(8, 3)), vector_names=("u", "v", "w"))
    node = weighted(
        low=(0.7, by_member({"a": a, "v": vector, "flat": flat}, partial(lower_confidence, coef=0.5))),
        dro=(2.0, by_member({"a": a, "b": b}, partial(kl_dro, beta=0.5))),
        far=(1.0, Combine({"a": a, "c": c}, partial(tchebycheff, weights=[1, 2], ideal=[1, 0]))),
        white=(-1.0, Whiten(a, place="white", state=state)),
        gated=(1.0, gate({"a": a, "flat": flat}, [1, 1], rules=[("math", {"a": 3.0})])),
        routed=(1.0, route({"c": c, "flat": flat}, rules=[("chat", "c")], default="flat")),
        adaptive=(1.0, Adaptive({"a": a, "c": c}, [1, -1], decay=0.9, place="adaptive", state=state)),
        rest=(1.0, Clip(Calibrate(Veto(c, flat, rule_name="r", below=0, cap=-1), mean=1, std=3), low=-1, high=1)),
    )
    state.observing = True
    node.score(rollouts)
    state.commit(state.take_pending())
    output = node.score(rollouts)
    assert output.token_scores is not None
    assert output.valid.tolist() == [i != 2 for i in range(8)]
    assert [len(row) for row in output.token_scores] == lengths.tolist()
    sums = np.array([row.sum(dtype=float) for row in output.token_scores])
    assert_allclose(sums[output.valid], output.scores[output.valid], atol=1e-5)
    assert not output.token_scores[2].any()


# --- nodes over one reward -------------------------------------------------------------------------------------------


def test_a_veto_caps_the_score_and_leaves_lower_ones(given, rollouts_of):
    rule = given(0.4, 0.4, 0.5, NAN, errors=("regex: too slow",))
    node = Veto(given(2.0, -3.0, 2.0, 2.0), rule, rule_name="rule", below=0.5, cap=-1.0)
    output = node.score(rollouts_of("", "", "", ""))
    assert_array_equal(output.scores, [-1.0, -3.0, 2.0, NAN])
    assert output.valid.tolist() == [True, True, True, False]
    assert_array_equal(output.parts["rule"], [0.4, 0.4, 0.5, NAN])
    assert output.errors == ("rule: regex: too slow",)


def test_calibration_is_a_shift_and_a_scale_after_the_clip(given, rollouts_of):
    node = Calibrate(given(1.0, 5.0, -9.0), mean=1.0, std=2.0, low=-3.0, high=4.0)
    output = node.score(rollouts_of("", "", ""))
    assert output.scores.tolist() == [0.0, 1.5, -2.0]
    assert output.parts["raw"].tolist() == [1.0, 5.0, -9.0]


def test_a_clip_bounds_both_sides(given, rollouts_of):
    output = Clip(given(-2.0, 0.5, 2.0, NAN), low=-1, high=1).score(rollouts_of("", "", "", ""))
    assert_array_equal(output.scores, [-1.0, 0.5, 1.0, NAN])


def test_whitening_leaves_scores_alone_until_the_first_commit_and_never_sees_invalid_ones(given, rollouts_of):
    state = RewardState()
    node = Whiten(given(1.0, 3.0, NAN), place="graph", state=state)
    state.observing = True
    assert node.score(rollouts_of("", "", "")).scores.tolist()[:2] == [1.0, 3.0]
    state.commit(state.take_pending())
    assert_array_equal(node.score(rollouts_of("", "", "")).scores, [-1.0, 1.0, NAN])


def test_whitening_without_the_shift_only_scales(given, rollouts_of):
    state = RewardState()
    node = Whiten(given(1.0, 5.0), place="graph", state=state, shift_mean=False)
    state.observing = True
    node.score(rollouts_of("", ""))
    state.commit(state.take_pending())
    assert node.score(rollouts_of("", "")).scores.tolist() == [0.5, 2.5]


def test_scores_without_spread_are_not_blown_up(given, rollouts_of):
    state = RewardState()
    node = Whiten(given(1000.1, 1000.1, 1000.1), place="graph", state=state)
    state.observing = True
    node.score(rollouts_of("", "", ""))
    state.commit(state.take_pending())
    assert_allclose(node.score(rollouts_of("", "", "")).scores, 0, atol=1e-9)


def test_adaptive_weights_give_a_small_scale_the_same_share_as_a_large_one(given, rollouts_of):
    state, rollouts = RewardState(), rollouts_of("", "")
    node = Adaptive({"a": given(0.0, 1.0), "b": given(100.0, 0.0)}, [1.0, 1.0], decay=0.5, place="graph", state=state)
    state.observing = True
    assert node.score(rollouts).scores.tolist() == [100.0, 1.0]
    state.commit(state.take_pending())
    assert node.score(rollouts).scores.tolist() == [2.0, 2.0]


# --- gate and route --------------------------------------------------------------------------------------------------


class ByLength:
    """A classifier of prompts: the first part for long ones, the second for short ones."""

    def __init__(self):
        self.seen = []

    def weights(self, prompts):
        self.seen += [prompt.text for prompt in prompts]
        return np.array([[1.0, 0.0] if len(prompt.text) > 3 else [0.25, 0.75] for prompt in prompts]), {}


class Broken:
    def weights(self, prompts):
        raise RuntimeError("out of memory")


class Partial:
    """Cannot read the first prompt."""

    def weights(self, prompts):
        return np.array([[NAN], *[[1.0]] * (len(prompts) - 1)]), {0: "there is no text to judge"}


def test_a_prompt_that_the_classifier_cannot_read_is_invalid_alone(given, rollouts_of):
    output = gate({"a": given(1.0, 2.0)}, [1], classifier=Partial()).score(rollouts_of("x", "y"))
    assert output.valid.tolist() == [False, True]
    assert output.errors == ("gate: prompt 10: the prompt classifier: there is no text to judge",)


def test_a_rule_that_weighs_no_part_is_told_once_a_prompt_and_asks_no_part(given, rollouts_of):
    part = given(1.0, 2.0)
    rollouts = rollouts_of("x", "y")
    rollouts = replace(rollouts, prompts=[rollouts.prompts[0]] * 2)
    output = gate({"a": part}, [1], rules=[("question", {"a": 0.0})]).score(rollouts)
    assert output.valid.tolist() == [False, False]
    assert output.errors == ("gate: prompt 10: no part has a weight, so nothing scores the response",)
    assert part.asked == []


@pytest.mark.parametrize("weight", [1e300, -1e308])
def test_weights_that_are_too_large_make_the_score_invalid_with_a_sentence(weight, given, rollouts_of):
    output = weighted(a=(weight, given(4.0, 0.0)), b=(weight, given(5.0, 0.0))).score(rollouts_of("x", "y"))
    assert output.valid[0] == np.False_
    assert "combined scores are no finite float32 numbers" in output.errors[0]


def test_a_response_to_which_no_member_applies_is_invalid_with_a_sentence(given, rollouts_of):
    members = given(1.0, vector=[[NAN, NAN]], vector_names=("x", "y"))
    output = by_member({"m": members}, worst_case).score(rollouts_of("x"))
    assert not output.valid[0]
    assert "no member applies to the response" in output.errors[0]


def test_a_scale_that_leaves_float32_makes_the_score_invalid_with_a_sentence(given, rollouts_of):
    node = Calibrate(given(1.0, 0.0, NAN, token_scores=[[1], [0], [0]]), mean=0.0, std=1e-40)
    output = node.score(rollouts_of("", "", ""))
    assert output.valid.tolist() == [False, True, False]
    assert output.errors == ("calibrate: 1 scores are no finite float32 numbers",)
    assert_array_equal(output.scores, [NAN, 0.0, NAN])


def test_a_gate_asks_the_data_then_its_rules_then_its_classifier(given, rollouts_of):
    rollouts = rollouts_of(
        *[""] * 4,
        questions=["math", "a math question", "long one", "hi"],
        metadata=[{"w": {"b": 5.0}}, {}, {}, {"w": None}],
    )
    classifier = ByLength()
    parts = {"a": given(1.0, 1.0, 1.0, 1.0), "b": given(10.0, 10.0, 10.0, 10.0)}
    node = gate(parts, [7, 7], key="w", rules=[("math", {"a": 2.0})], classifier=classifier)
    assert node.score(rollouts).scores.tolist() == [50.0, 2.0, 1.0, 0.25 + 7.5]
    assert classifier.seen == ["long one", "hi"]


def test_a_gate_without_an_opinion_uses_the_parts_own_weights(given, rollouts_of):
    node = gate({"a": given(1.0), "b": given(10.0)}, [2, 3], rules=[("code", {"a": 1.0})])
    assert node.score(rollouts_of("x")).scores.tolist() == [32.0]


def test_a_gate_does_not_ask_a_part_of_weight_zero_so_that_it_cannot_fail_there(given, rollouts_of):
    answer = given(NAN, 1.0)
    node = gate({"chat": given(3.0, 3.0), "answer": answer}, [1, 0], rules=[("math", {"answer": 2.0})])
    output = node.score(rollouts_of("x", "y", questions=["hello", "math"]))
    assert output.scores.tolist() == [3.0, 2.0]
    assert answer.asked == [[1]]
    assert_array_equal(output.parts["chat"], [3.0, NAN])


def test_armorms_debiased_gate_as_weights_of_the_data_row(given, rollouts_of):
    parts = {"helpful": given(0.8), "honest": given(0.4), "verbose": given(0.6)}
    row = {"w": {"helpful": 0.5, "honest": 0.3, "verbose": -0.31}}
    output = gate(parts, [1, 1, 1], key="w").score(rollouts_of("x", metadata=[row]))
    assert_allclose(output.scores, [0.334])


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"c": 1.0}, "w weighs 'c'; the parts are a"),
        ([1.0], "w=[1.0] is not a mapping of part names to weights"),
        ({"a": NAN}, "w={'a': nan} is not a mapping"),
        ({"a": True}, "w={'a': True} is not a mapping"),
        ({"a": 10**400}, "w={'a': 1000"),
        ({"a": 0.0}, "no part has a weight, so nothing scores the response"),
        ({}, "no part has a weight"),
    ],
)
def test_weights_that_cannot_be_read_make_the_row_invalid_with_a_sentence(weights, sentence, given, rollouts_of):
    rollouts = rollouts_of("x", "y", metadata=[{"w": weights}, {}])
    output = gate({"a": given(1.0, 2.0)}, [1], key="w").score(rollouts)
    assert output.valid.tolist() == [False, True]
    assert output.errors[0].startswith(f"gate: prompt 10: {sentence}")


def test_a_classifier_that_fails_makes_the_rows_that_need_it_invalid(given, rollouts_of):
    node = gate({"a": given(1.0, 2.0)}, [1], rules=[("math", {"a": 1.0})], classifier=Broken())
    output = node.score(rollouts_of("x", "y", questions=["math", "chat"]))
    assert output.valid.tolist() == [True, False]
    assert output.errors == ("gate: the prompt classifier: RuntimeError: out of memory",)


def test_a_route_asks_the_chosen_part_alone(given, rollouts_of):
    math, chat, rest = given(1.0, 1.0, 1.0, 1.0), given(2.0, 2.0, 2.0, 2.0), given(3.0, 3.0, 3.0, 3.0)
    node = route({"math": math, "chat": chat, "rest": rest}, key="task", rules=[("prove", "math"), ("hello", "chat")])
    output = node.score(
        rollouts_of(
            *[""] * 4,
            questions=["hello", "prove it", "hello", "?"],
            metadata=[{"task": "math"}, {}, {}, {"task": "chat"}],
        )
    )
    assert output.scores.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert (math.asked, chat.asked, rest.asked) == ([[0, 1]], [[2, 3]], [])
    assert_array_equal(output.parts["math"], [1.0, 1.0, NAN, NAN])
    assert np.isnan(output.parts["rest"]).all()


def test_the_rest_of_a_route_goes_to_its_default_or_is_invalid_with_a_sentence(given, rollouts_of):
    rollouts = rollouts_of("", "", questions=["a", "b"], metadata=[{"task": "poetry"}, {}])
    parts = {"math": given(1.0, 1.0)}
    assert route(parts, key="task", default="math").score(rollouts).scores.tolist() == [1.0, 1.0]
    output = route(parts, key="task").score(rollouts)
    assert not output.valid.any()
    assert output.errors == (
        "route: prompt 10: task='poetry' names no part, and there is no default",
        "route: prompt 11: no rule matches, and there is no default",
    )


def test_a_route_keeps_groups_together(given, rollouts_of):
    def grouped(rollouts):
        sizes.append(len(rollouts))
        return RewardOutput(scores=np.arange(len(rollouts), dtype=float), valid=np.ones(len(rollouts), bool))

    sizes: list[int] = []
    listwise = given()
    listwise.score = grouped
    rollouts = rollouts_of("", "", "", "", questions=["rank", "rank", "other", "other"])
    output = route({"list": listwise, "rest": given(*[9.0] * 4)}, rules=[("rank", "list")], default="rest").score(
        rollouts
    )
    assert sizes == [2]
    assert output.scores.tolist() == [0.0, 1.0, 9.0, 9.0]


def test_a_route_lays_out_dense_parts_beside_others(given, rollouts_of):
    dense = given(3.0, 3.0, token_scores=[[1, 2], [1, 2]])
    node = route({"dense": dense, "flat": given(5.0, 5.0)}, rules=[("d", "dense")], default="flat")
    output = node.score(rollouts_of("x", "y", questions=["d", "f"]))
    assert output.token_scores is not None
    assert [row.tolist() for row in output.token_scores] == [[1.0, 2.0], [0.0, 5.0]]


# --- sources ---------------------------------------------------------------------------------------------------------


class Raising:
    def score(self, rollouts):
        raise ConnectionError("no route to http://me:secret@host/score")


def test_what_a_leaf_raises_makes_its_call_invalid_without_telling_secrets(rollouts_of):
    output = Source("helpful", Raising(), "drop", RewardState()).score(rollouts_of("a", "b"))
    assert not output.valid.any()
    assert output.resample is None
    assert output.errors == ("Raising: ConnectionError: no route to http://***@host/score",)


def test_the_policy_raise_stops_with_the_first_sentences(given, rollouts_of):
    reward = given(1.0, NAN, NAN, NAN, NAN, errors=("one", "two", "three", "four"))
    source = Source("helpful/quality", reward, "raise", RewardState())
    with pytest.raises(RewardFailedError, match=r"helpful/quality: 4 of 5 scores failed.*: one; two; three$"):
        weighted(a=(1.0, source)).score(rollouts_of(*"abcde"))
    assert Source("x", given(1.0), "raise", RewardState()).score(rollouts_of("a")).valid.all()


def test_the_policy_resample_asks_for_the_failed_rows_alone(given, rollouts_of):
    output = Source("x", given(1.0, NAN), "resample", RewardState()).score(rollouts_of("a", "b"))
    assert output.resample is not None
    assert output.resample.tolist() == [False, True]
    assert Source("x", given(1.0, 2.0), "resample", RewardState()).score(rollouts_of("a", "b")).resample is None


def test_each_call_of_a_source_is_recorded_with_its_failures_and_scores(given, rollouts_of):
    state = RewardState()
    Source("x", given(1.0, 3.0, NAN), "drop", state).score(rollouts_of("a", "b", "c"))
    with pytest.raises(RewardFailedError):
        Source("y", given(NAN), "raise", state).score(rollouts_of("a"))
    first, second = state.take_calls()
    assert (first.source, first.num_responses, first.num_failed, first.num_truncated) == ("x", 3, 1, 0)
    assert (first.score_mean, first.score_std) == (2.0, 1.0)
    assert first.seconds >= 0
    assert (second.source, second.num_failed) == ("y", 1)
    assert np.isnan(second.score_mean)
    assert state.take_calls() == []


def test_a_leaf_that_calls_infinity_valid_is_corrected(given, rollouts_of):
    output = Source("x", given(np.inf, 1.0, valid=[True, True]), "drop", RewardState()).score(rollouts_of("a", "b"))
    assert output.valid.tolist() == [False, True]
    assert output.errors == ("GivenReward: 1 scores are no finite float32 numbers",)


class Exiting:
    def score(self, rollouts):
        raise SystemExit(3)


def test_a_leaf_that_would_end_the_process_fails_instead(rollouts_of):
    output = Source("x", Exiting(), "drop", RewardState()).score(rollouts_of("a"))
    assert output.errors == ("Exiting: SystemExit: 3",)


class Short:
    def score(self, rollouts):
        return RewardOutput(scores=np.array([1.0]), valid=np.array([True]), parts={"p": np.array([1.0])})


def test_a_leaf_with_the_wrong_number_of_scores_makes_every_response_invalid(rollouts_of):
    output = Source("x", Short(), "drop", RewardState()).score(rollouts_of("a", "b"))
    assert output.valid.tolist() == [False, False]
    assert output.errors == ("Short: 1 scores for 2 responses",)
    assert list(output.parts) == ["p"]


def test_token_scores_that_do_not_fit_the_response_make_their_row_invalid(given, rollouts_of):
    reward = given(1.0, 1.0, 1.0, token_scores=[[0, 1], [1], [NAN, 1]])
    output = Source("x", reward, "drop", RewardState()).score(rollouts_of("a", "b", "c"))
    assert output.valid.tolist() == [True, False, False]
    assert output.errors == ("GivenReward: 2 rows of token scores are not one finite number a response token",)
    assert output.token_scores is not None
    assert [len(row) for row in output.token_scores] == [2, 2, 2]


def test_the_columns_of_a_vector_are_parts_under_names_that_a_metric_may_have(given, rollouts_of):
    reward = given(1.0, vector=[[0.5, 1.5]], vector_names=("HelpSteer-Helpful", "is it true?"))
    output = Source("x", reward, "drop", RewardState()).score(rollouts_of("a"))
    assert parts_of(output) == {"helpsteer_helpful": [0.5], "is_it_true_": [1.5]}
    assert parts_of(weighted(q=(1.0, Source("q", reward, "drop", RewardState()))).score(rollouts_of("a"))) == {
        "q": [1.0],
        "q/helpsteer_helpful": [0.5],
        "q/is_it_true_": [1.5],
    }


def test_columns_that_would_share_a_name_get_suffixes_whatever_their_order(given, rollouts_of):
    columns = {"is it?": 1.0, "is_it_": 2.0, "Is It!": 3.0}
    for names in (list(columns), list(columns)[::-1]):
        reward = given(1.0, vector=[[columns[name] for name in names]], vector_names=tuple(names))
        output = Source("x", reward, "drop", RewardState()).score(rollouts_of("a"))
        assert parts_of(output) == {"is_it_": [2.0], "is_it__2": [3.0], "is_it__3": [1.0]}


def test_scores_do_not_depend_on_how_many_workers_share_the_state(given, rollouts_of):
    values = np.random.default_rng(0).normal(3.0, 2.0, size=12)
    rollouts = rollouts_of(*[""] * 12)

    def trained(num_workers):
        states = [RewardState() for _ in range(num_workers)]
        nodes = [Whiten(given(*values), place="graph", state=state, decay=0.7) for state in states]
        for step in range(3):
            for state in states:
                state.observing = True
            for i in range(12):
                if i % 4 != step:
                    nodes[i % num_workers].score(rollouts.select([i]))
            merged = merge_pending([state.take_pending() for state in states])
            for state in states:
                state.commit(merged)
        return nodes[-1].score(rollouts).scores

    assert_allclose(trained(1), trained(3), rtol=1e-12)
    assert_allclose(trained(1), trained(2), rtol=1e-12)
