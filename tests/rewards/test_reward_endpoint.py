"""What crosses the wire, and the endpoint before a scoring of the test's own."""

import asyncio
import json
import tracemalloc

import pytest
from starlette.requests import Request

from raylhf.config.service import ServeConfig
from raylhf.rewards.endpoint import ScoreEndpoint, token_digest
from raylhf.rewards.texts import MAX_NUM_TOKENS, TextSample, rollouts_of_texts
from raylhf.rewards.wire import RequestError, Scored, parse_request, renumbered

TOKEN = "a-token-of-thirty-two-characters"
SAMPLE = {"prompt": [{"role": "user", "content": "How?"}], "response": "So."}


def body_of(**changes):
    return json.dumps({"version": 1, "samples": [SAMPLE | changes]}).encode()


def endpoint_of(score):
    return ScoreEndpoint(ServeConfig(), token_digest(TOKEN), score=score, probe=lambda: asyncio.sleep(0))


async def ask(endpoint, body):
    """The answer to POST /score."""
    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": headers}

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    return await endpoint(Request(scope, receive))


def count(endpoint, status):
    return endpoint.metrics.requests.labels(status=status)._value.get()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError(), "scoring failed: ValueError"),
        (ValueError("\n"), "scoring failed: ValueError"),
        (KeyError("one\ntwo"), "scoring failed: KeyError: 'one\\ntwo'"),
        (OSError("first\nsecond"), "scoring failed: OSError: first"),
    ],
)
def test_a_scorers_failure_is_a_sentence_whatever_it_says(error, sentence):
    async def score(samples):
        raise error

    endpoint = endpoint_of(score)
    response = asyncio.run(ask(endpoint, body_of()))
    assert (response.status_code, json.loads(response.body)) == (500, {"error": sentence})
    assert count(endpoint, "500") == 1


def test_half_a_surrogate_pair_in_a_sentence_breaks_no_answer():
    async def score(samples):
        return Scored([None], {}, ["leaf: prompt 0: \ud800 \u00fc"])

    endpoint = endpoint_of(score)
    response = asyncio.run(ask(endpoint, body_of()))
    assert response.status_code == 200
    assert json.loads(response.body)["errors"] == ["leaf: prompt 0: ? \u00fc"]

    async def fail(samples):
        raise ValueError("\udfff")

    assert json.loads(asyncio.run(ask(endpoint_of(fail), body_of())).body)["error"] == "scoring failed: ValueError: ?"


def test_a_cancelled_request_is_counted():
    async def score(samples):
        raise asyncio.CancelledError

    endpoint = endpoint_of(score)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask(endpoint, body_of()))
    assert count(endpoint, "none") == 1


def test_more_tokens_than_any_response_has_are_refused():
    assert parse_request(body_of(num_tokens=MAX_NUM_TOKENS), max_samples=1)[0].num_tokens == MAX_NUM_TOKENS
    for num_tokens in (MAX_NUM_TOKENS + 1, 10**15, 10**30):
        with pytest.raises(RequestError, match="num_tokens"):
            parse_request(body_of(num_tokens=num_tokens), max_samples=1)


def test_placeholders_of_tokens_take_no_memory():
    tracemalloc.start()
    try:
        rollouts = rollouts_of_texts([TextSample((), "x", num_tokens=MAX_NUM_TOKENS)] * 100)
        assert rollouts.response_lengths.tolist() == [MAX_NUM_TOKENS] * 100
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("picky: prompt 5: bad; prompt 2 too", "picky: sample 11: bad; prompt 2 too"),
        ("a: b: function.of:mine: prompt 4: bad", "a: b: function.of:mine: sample 10: bad"),
        ("picky: prompt 3: bad", "picky: a sample of another request: bad"),
        ("remote http://x: see prompt 5: it is bad", "remote http://x: see prompt 5: it is bad"),
        ("the model: no prompt 5 here", "the model: no prompt 5 here"),
    ],
)
def test_only_the_planes_own_name_of_a_prompt_becomes_the_requests_sample(sentence, told):
    assert renumbered(sentence, range(4, 7), 10) == told
