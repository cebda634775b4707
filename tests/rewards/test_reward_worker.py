import asyncio
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raylhf.batch import RewardOutput
from raylhf.config.reward import RewardPlaneConfig
from raylhf.rewards.source import Source
from raylhf.rewards.state import RewardState, merge_pending
from raylhf.rewards.texts import TextSample, rollouts_of_texts
from raylhf.rewards.validity import NAMED_PROMPT
from raylhf.rewards.worker import RewardWorker, rows_of

CHARACTERS = {"kind": "characters", "characters": "a"}


def worker(penalty=1.0, clip=None, plane=None, **graph):
    graph = graph or CHARACTERS
    config = {"graph": graph, "missing_eos_penalty": penalty, "clip": clip, **(plane or {})}
    started = RewardWorker(RewardPlaneConfig.model_validate(config))
    started.start()
    return started


def score(scorer, *requests) -> list[Any]:
    """The answers to requests that are made at one time."""

    async def all_of_them():
        return await asyncio.gather(*(scorer.score(request) for request in requests), return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "worker_rewards.py").write_text(
        "import threading\n"
        "started, go_on = threading.Event(), threading.Event()\n"
        "def slow(prompt, response, metadata):\n"
        "    started.set()\n"
        "    assert go_on.wait(10)\n"
        "    return float(len(response))\n"
        "def moody(prompt, response, metadata):\n"
        "    return None if response == 'bad' else float(len(response))\n"
        "def exiting(prompt, response, metadata):\n"
        "    raise SystemExit('prompt 11: enough')\n"
        "def huge(prompt, response, metadata):\n"
        "    return 3e38\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "worker_rewards"
    sys.modules.pop("worker_rewards", None)


def test_the_penalty_meets_truncated_responses_only_and_the_clip_comes_after_it(rollouts_of):
    rollouts = rollouts_of("aaab", "aaab", "bbbb", truncated=[1, 2])
    assert worker(penalty=1.0).score_now(rollouts).scores.tolist() == [0.75, -0.25, -1.0]
    # Clipped first, the second would be 0.5 - 1 = -0.5.
    assert worker(penalty=1.0, clip=0.5).score_now(rollouts).scores.tolist() == [0.5, -0.25, -0.5]


def test_the_summary_is_lists_with_a_sentence_for_what_is_invalid(rollouts_of):
    ((output, summary),) = score(worker(), rollouts_of("aaaa", "aabb", "aaaa", empty=[2]))
    assert output.valid.tolist() == [True, True, False]
    np.testing.assert_array_equal(output.scores, [1.0, 0.5, np.nan])
    assert summary.pop("seconds") >= 0
    assert summary["scores"][:2] == [1.0, 0.5]
    assert math.isnan(summary.pop("scores")[2])
    (call,) = summary.pop("sources")
    assert call.pop("seconds") >= 0
    counts = {"num_responses": 2, "num_failed": 0, "num_truncated": 0}
    assert call == {"source": "characters", **counts, "score_mean": 0.75, "score_std": 0.25}
    assert summary == {
        "valid": [True, True, False],
        "resample": [False, False, False],
        "parts": {},
        "errors": ("1 of 3 responses have no tokens and are not scored",),
    }


def test_the_summarys_parts_are_raw_and_the_penalty_is_on_the_sum_alone(rollouts_of):
    part = {"name": "a_share", "weight": 2.0, "reward": CHARACTERS}
    ((_, summary),) = score(worker(kind="sum", parts=[part]), rollouts_of("ab", truncated=[0]))
    assert summary["scores"] == [0.0]
    assert summary["parts"] == {"a_share": [0.5]}


def test_a_response_of_an_end_token_alone_is_scored(rollouts_of):
    output = worker().score_now(rollouts_of(""))
    assert output.valid.tolist() == [True]
    assert output.scores.tolist() == [0.0]


def test_a_response_without_tokens_is_no_failure_of_the_reward(rollouts_of, user_module):
    strict = worker(kind="function", path=f"{user_module}:moody", on_failure="raise")
    output = strict.score_now(rollouts_of("bad", "good", empty=[0]))
    assert output.valid.tolist() == [False, True]
    assert strict.score_now(rollouts_of("bad", empty=[0])).errors == (
        "1 of 1 responses have no tokens and are not scored",
    )


def test_a_batch_without_one_valid_score_has_three_sentences_at_most(rollouts_of):
    broken = worker(kind="function", path="math:sqrt")
    ((output, summary),) = score(broken, rollouts_of("a", "b", "c", "d", truncated=[0]))
    assert not output.valid.any()
    assert np.isnan(output.scores).all()
    assert len(output.errors) == 4
    assert len(summary["errors"]) == 3
    assert summary["errors"][0].startswith("math:sqrt: prompt 10: TypeError")


def test_no_responses_are_no_error(rollouts_of):
    ((output, summary),) = score(worker(), rollouts_of())
    assert len(output.scores) == 0
    assert summary["scores"] == summary["valid"] == []
    assert summary["errors"] == ()


def test_token_scores_are_laid_out_to_the_final_score(given, rollouts_of):
    scorer = worker(penalty=1.0, clip=4.0)
    scorer._reward = given(6.0, 1.0, 2.0, token_scores=[[2, 4], [1, 0], [1, 1]])
    output = scorer.score_now(rollouts_of("x", "y", "z", truncated=[1], empty=[2]))
    assert output.token_scores is not None
    assert [row.tolist() for row in output.token_scores] == [[2.0, 2.0], [1.0, -1.0], []]


class Unreliable:
    """A token-level ensemble that fails on every other call."""

    def __init__(self):
        self.num_calls = 0

    def score(self, rollouts):
        self.num_calls += 1
        if self.num_calls % 2 == 0:
            raise RuntimeError("out of memory")
        ones = np.ones(len(rollouts))
        return RewardOutput(
            scores=ones,
            valid=ones > 0,
            vector=np.stack([ones, ones], axis=1),
            vector_names=("m0", "m1"),
            token_scores=[np.full(n, 1 / n, dtype=np.float32) for n in rollouts.response_lengths],
        )


def test_outputs_of_calls_that_failed_join_with_those_that_did_not(rollouts_of):
    graph = {"kind": "token_level", "path": "rm"}
    scorer = RewardWorker(RewardPlaneConfig.model_validate({"graph": graph}), policy="policy")
    scorer._reward = Source("token_level", Unreliable(), "drop", RewardState())
    joined = RewardOutput.concatenate([scorer.score_now(rollouts_of("a", "b")) for _ in range(2)])
    assert joined.valid.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(joined.parts["m1"], [1.0, 1.0, np.nan, np.nan])
    assert joined.token_scores is not None
    assert [row.sum() for row in joined.token_scores] == [1.0, 1.0, 0.0, 0.0]


def test_rows_to_be_sampled_anew_are_told(rollouts_of, user_module):
    scorer = worker(kind="function", path=f"{user_module}:moody", on_failure="resample")
    ((output, summary),) = score(scorer, rollouts_of("good", "bad"))
    assert summary["resample"] == [False, True]
    assert output.resample is not None
    assert output.resample.tolist() == [False, True]


def test_requests_of_one_time_are_scored_together_and_answered_apart(rollouts_of):
    requests = [rollouts_of("a"), rollouts_of("ab", "b"), rollouts_of("aab", "aa", "bbbb", truncated=[2])]
    alone = [worker().score_now(request) for request in requests]
    answers = score(worker(), *requests)
    for (output, summary), expected in zip(answers, alone, strict=True):
        assert output.scores.tolist() == expected.scores.tolist() == summary["scores"]
        assert output.errors == expected.errors
    calls = [call for _, summary in answers for call in summary["sources"]]
    assert [call["num_responses"] for call in calls] == [6]


def test_what_arrives_while_the_worker_scores_waits_and_is_scored_together(rollouts_of, user_module):
    scorer = worker(kind="function", path=f"{user_module}:slow")
    module = sys.modules[user_module]

    async def one_then_many():
        first = asyncio.create_task(scorer.score(rollouts_of("x")))
        await asyncio.to_thread(module.started.wait, 10)
        rest = [asyncio.create_task(scorer.score(rollouts_of("y" * n))) for n in (2, 3, 4, 5)]
        await asyncio.sleep(0)
        module.go_on.set()
        return await asyncio.gather(first, *rest)

    answers = asyncio.run(one_then_many())
    assert [output.scores.tolist() for output, _ in answers] == [[1.0], [2.0], [3.0], [4.0], [5.0]]
    assert [len(summary["sources"]) for _, summary in answers] == [1, 1, 0, 0, 0]
    assert answers[1][1]["sources"][0]["num_responses"] == 4


def test_a_batch_keeps_to_the_token_budget_and_to_one_temperature(rollouts_of):
    # Eight budgets of 2 tokens; a request has 4 prompt tokens and 4 response tokens, so two make a batch.
    scorer = worker(plane={"batch_tokens": 2})
    hot = replace(rollouts_of("aab"), temperature=2.0)
    answers = score(scorer, *[rollouts_of("aaa") for _ in range(5)], hot)
    calls = [call["num_responses"] for _, summary in answers for call in summary["sources"]]
    assert calls == [2, 2, 1, 1]
    assert answers[-1][0].scores.tolist() == [2 / 3]


def test_a_request_above_the_budget_is_scored_alone(rollouts_of):
    answers = score(worker(plane={"batch_tokens": 1}), rollouts_of("a" * 50), rollouts_of("b" * 50))
    assert [output.scores.tolist() for output, _ in answers] == [[1.0], [0.0]]


def test_each_request_is_told_of_its_own_failures(rollouts_of, user_module):
    def request(index, text):
        rollouts = rollouts_of(text)
        return replace(rollouts, prompts=[replace(rollouts.prompts[0], index=index)])

    scorer = worker(kind="function", path=f"{user_module}:moody")
    answers = score(scorer, request(3, "bad"), request(4, "good"), request(34, "bad"))
    told = [[error.split(": ")[1] for error in summary["errors"]] for _, summary in answers]
    assert told == [["prompt 3"], [], ["prompt 34"]]


def test_what_the_graph_raises_reaches_every_request_of_the_batch_and_the_worker_serves_on(rollouts_of, user_module):
    scorer = worker(kind="function", path=f"{user_module}:moody", on_failure="raise")
    answers = score(scorer, rollouts_of("bad"), rollouts_of("good"))
    assert [type(answer).__name__ for answer in answers] == ["RewardFailedError", "RewardFailedError"]
    assert "function: 1 of 2 scores failed, and its on_failure is raise" in str(answers[0])
    ((output, _),) = score(scorer, rollouts_of("good"))
    assert output.scores.tolist() == [4.0]


def test_a_request_that_nobody_waits_for_any_more_is_not_scored(rollouts_of, user_module):
    scorer = worker(kind="function", path=f"{user_module}:slow")
    module = sys.modules[user_module]

    async def leave():
        first = asyncio.create_task(scorer.score(rollouts_of("x")))
        await asyncio.to_thread(module.started.wait, 10)
        left, stayed = (asyncio.create_task(scorer.score(rollouts_of(text))) for text in ("yy", "zzz"))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        module.go_on.set()
        return await first, await stayed

    _, (output, summary) = asyncio.run(leave())
    assert output.scores.tolist() == [3.0]
    assert [call["num_responses"] for call in summary["sources"]] == [1]


def test_who_waits_when_the_worker_closes_is_told(rollouts_of, user_module):
    scorer = worker(kind="function", path=f"{user_module}:slow")
    module = sys.modules[user_module]

    async def close():
        first = asyncio.create_task(scorer.score(rollouts_of("x")))
        await asyncio.to_thread(module.started.wait, 10)
        waiting = asyncio.create_task(scorer.score(rollouts_of("yy")))
        await asyncio.sleep(0)
        scorer.close()
        module.go_on.set()
        return await asyncio.gather(first, waiting, return_exceptions=True)

    first, waiting = asyncio.run(close())
    assert not isinstance(first, BaseException)
    assert "closed before it scored" in str(waiting)


def test_workers_that_commit_the_same_score_the_same(rollouts_of):
    workers = [worker(kind="whiten", reward=CHARACTERS) for _ in range(2)]
    assert workers[0].needs_commit()
    for each, text in zip(workers, ("aaaa", "bbbb"), strict=True):
        each.set_observing(True)
        each.score_now(rollouts_of(text))
    merged = merge_pending([each.take_pending() for each in workers])
    for each in workers:
        each.commit(merged)
        each.set_observing(False)
        assert each.score_now(rollouts_of("aaaa", "aabb")).scores.tolist() == [1.0, 0.0]
        assert each.take_pending() == {}
    resumed = worker(kind="whiten", reward=CHARACTERS)
    resumed.load_state_dict(workers[0].state_dict())
    assert not resumed.needs_commit()
    assert resumed.score_now(rollouts_of("bbbb")).scores.tolist() == [-1.0]


def test_texts_from_outside_are_scored_as_rollouts():
    rows = [
        TextSample(({"role": "user", "content": "q"},), "aab", {"k": 1}),
        TextSample((), "", is_truncated=True),
        TextSample((), "x", num_tokens=9),
    ]
    rollouts = rollouts_of_texts(rows)
    assert [prompt.index for prompt in rollouts.prompts] == [0, 1, 2]
    assert rollouts.prompts[0].metadata == {"k": 1}
    assert rollouts.response_lengths.tolist() == [1, 1, 9]
    assert rollouts.is_truncated.tolist() == [False, True, False]
    assert worker(penalty=0.5).score_now(rollouts).scores.tolist() == [2 / 3, -0.5, 0.0]


def test_a_rule_that_counts_tokens_counts_those_of_a_text():
    rollouts = rollouts_of_texts([TextSample((), "x", num_tokens=n) for n in (10, 16, 17, 18, 20, 22)])
    overlong = worker(kind="overlong", max_tokens=20, buffer=4)
    assert overlong.score_now(rollouts).scores.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_texts_hold_a_place_in_a_batch_by_their_length():
    short, long = rollouts_of_texts([TextSample((), "x"), TextSample(({"role": "user", "content": "y" * 400},), "z")])\
        .prompt_ids  # fmt: skip
    assert len(short) == 1
    assert len(long) == 101


def test_a_graph_of_rules_is_built_and_served_without_torch():
    program = (
        "import asyncio, sys\n"
        "from raylhf.config.reward import RewardPlaneConfig\n"
        "from raylhf.rewards import RewardWorker\n"
        "from raylhf.rewards.texts import TextSample, rollouts_of_texts\n"
        "part = {'name': 'a', 'reward': {'kind': 'whiten', 'reward': {'kind': 'format'}}}\n"
        "worker = RewardWorker(RewardPlaneConfig.model_validate({'graph': {'kind': 'kl_dro', 'parts': [part]}}))\n"
        "worker.start()\n"
        "output, _ = asyncio.run(worker.score(rollouts_of_texts([TextSample((), 'Fine.')])))\n"
        "assert output.scores.tolist() == [1.0]\n"
        "assert not {'torch', 'transformers', 'vllm', 'ray', 'deepspeed'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


class Ending:
    """Ends the thread that asks for a score, past every leaf's own care."""

    def score(self, rollouts):
        raise SystemExit("a panic")


def test_what_would_end_the_worker_reaches_every_request_and_the_worker_serves_on(rollouts_of):
    scorer = worker()
    reward, scorer._reward = scorer._reward, Ending()
    answers = score(scorer, rollouts_of("a"), rollouts_of("b"))
    assert [str(answer) for answer in answers] == ["the reward ended with SystemExit: a panic"] * 2
    assert all(isinstance(answer, RuntimeError) for answer in answers)
    scorer._reward = reward
    ((output, _),) = score(scorer, rollouts_of("a"))
    assert output.scores.tolist() == [1.0]


def test_a_function_that_exits_fails_its_response_and_names_no_other_prompt(rollouts_of, user_module):
    def request(index):
        rollouts = rollouts_of("x")
        return replace(rollouts, prompts=[replace(rollouts.prompts[0], index=index)])

    answers = score(worker(kind="function", path=f"{user_module}:exiting"), request(10), request(11))
    for (output, _), index in zip(answers, (10, 11), strict=True):
        assert output.errors == (f"{user_module}:exiting: prompt {index}: SystemExit: prompt 11: enough",)


def test_requests_that_are_left_when_the_serving_is_cancelled_are_told(rollouts_of, user_module):
    scorer = worker(kind="function", path=f"{user_module}:slow")
    module = sys.modules[user_module]

    async def cancel():
        first = asyncio.create_task(scorer.score(rollouts_of("x")))
        await asyncio.to_thread(module.started.wait, 10)
        second = asyncio.create_task(scorer.score(rollouts_of("yy")))
        await asyncio.sleep(0)
        assert scorer._serving is not None
        scorer._serving.cancel()
        answers = asyncio.gather(first, second, return_exceptions=True)
        try:
            return await asyncio.wait_for(answers, timeout=5)
        finally:
            module.go_on.set()

    told = [str(answer) for answer in asyncio.run(cancel())]
    assert told == [
        "the reward worker was stopped before it answered the request",
        "the reward worker was closed before it scored the request",
    ]


@pytest.mark.parametrize(
    ("sentence", "index"),
    [
        ("answer: prompt 7: ValueError: prompt 8: no", "7"),
        ("helpful: strict: my.module:score: prompt 7: prompt 8: no", "7"),
        ("gate: prompt 7: no part has a weight", "7"),
        ("remote http://host: prompt 7: it was bad", None),
        ("helpful: Leaf: ValueError: prompt 7: it was bad", None),
        ("the server says: see prompt 7", None),
    ],
)
def test_a_sentence_is_about_the_prompt_that_it_begins_with(sentence, index):
    found = NAMED_PROMPT.search(sentence)
    assert (None if found is None else found[1]) == index


def test_an_invalid_response_without_a_sentence_of_its_own_is_told_all(rollouts_of):
    output = RewardOutput(
        scores=np.array([math.nan, 1.0]), valid=np.array([False, True]), errors=("answer: prompt 99: no answer",)
    )
    assert rows_of(output, slice(0, 1), rollouts_of("a")).errors == ("answer: prompt 99: no answer",)
    assert rows_of(output, slice(1, 2), rollouts_of("a")).errors == ()


def test_a_score_beyond_float32_is_invalid_even_where_a_clip_would_bound_it(rollouts_of, user_module):
    scorer = worker(penalty=1e38, clip=5.0, kind="function", path=f"{user_module}:huge")
    scorer._reward = Negated(scorer._reward)
    output = scorer.score_now(rollouts_of("a", "b", truncated=[1]))
    assert output.valid.tolist() == [True, False]
    assert output.scores[0] == -5.0 and math.isnan(output.scores[1])
    assert output.errors == ("reward: 1 scores are no finite float32 numbers",)


class Negated:
    def __init__(self, reward):
        self._reward = reward

    def score(self, rollouts):
        output = self._reward.score(rollouts)
        return replace(output, scores=-output.scores)
