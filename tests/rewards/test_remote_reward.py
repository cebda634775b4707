"""The remote reward against servers that misbehave. Deadlines are short; the margins allow for a busy machine."""

import asyncio
import gc
import socket
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
from aiohttp import web

from raylhf.rewards.breaker import CircuitBreaker
from raylhf.rewards.remote import RemoteReward, as_json, retry_after_s

TOKEN = "s3cret-token"
SHORT = {"deadline_s": 0.6, "attempt_timeout_s": 0.4}
MARGIN_S = 2.0


class RewardServer:
    """An aiohttp server on a free port of this machine, in a thread. `handle` answers POST /score."""

    def __init__(self, handle, health_status=200):
        self.requests = []
        self.probes = 0
        self.health_status = health_status
        self._handle = handle
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _run(self):
        app = web.Application(client_max_size=10**8)
        app.add_routes([web.post("/score", self._score), web.get("/health", self._health)])
        runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _score(self, request):
        body = await request.json()
        self.requests.append((body, request.headers))
        return await self._handle(request, body)

    async def _health(self, request):
        assert "Authorization" not in request.headers
        self.probes += 1
        return web.json_response({"status": "ok"}, status=self.health_status)

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def serve():
    servers = []

    def start(handle, **options):
        servers.append(RewardServer(handle, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def remote(url, **changes):
    settings = {
        "url": url,
        "token_env": None,
        "token_file": None,
        "deadline_s": 20.0,
        "attempt_timeout_s": 10.0,
        "retries": 0,
        "batch_size": 64,
        "max_response_bytes": 4096,
        "breaker_failures": 100,
        "breaker_reset_s": 30.0,
    }
    return RemoteReward(**settings | changes)


async def lengths(_, body):
    return web.json_response({"scores": [len(sample["response"]) for sample in body["samples"]], "token_scores": None})


def answer_with(status=200, **options):
    async def handle(request, body):
        return web.Response(status=status, **options)

    return handle


def answer_json(text):
    return answer_with(text=text, content_type="application/json")


def only_failure(reward, rollouts, num_errors=1):
    """The one sentence of a call whose every score must be invalid, and which must not outlast a short deadline."""
    started = time.monotonic()
    output = reward.score(rollouts)
    assert time.monotonic() - started < SHORT["deadline_s"] + MARGIN_S
    assert not output.valid.any() and np.isnan(output.scores).all()
    assert len(output.errors) == num_errors
    return output.errors[0]


def test_scores_keep_their_order_over_parallel_batches_and_the_request_says_it_all(serve, rollouts_of):
    server = serve(lengths)
    rollouts = rollouts_of("a", "bb", "ccc", "dddd", "eeeee", truncated=[1])
    output = remote(server.url + "/", batch_size=2).score(rollouts)
    assert output.scores.tolist() == [1, 2, 3, 4, 5]
    assert output.valid.all() and output.errors == () and output.token_scores is None
    bodies = sorted((body for body, _ in server.requests), key=lambda body: body["samples"][0]["response"])
    assert [len(body["samples"]) for body in bodies] == [2, 2, 1]
    assert bodies[0]["version"] == 1
    assert bodies[0]["samples"][1] == {
        "prompt": [{"role": "user", "content": "question 1"}],
        "response": "bb",
        "metadata": {"row": 1},
        "is_truncated": True,
        "num_tokens": 3,
    }
    assert all("Authorization" not in headers for _, headers in server.requests)


def test_no_responses_need_no_request(serve, rollouts_of):
    server = serve(lengths)
    assert len(remote(server.url).score(rollouts_of()).scores) == 0
    assert server.requests == []


def test_metadata_that_json_lacks_is_converted(serve, rollouts_of):
    server = serve(lengths)
    odd = {"nan": np.float32("nan"), "array": np.arange(2), 3: (1, {2}), "path": ValueError("x")}
    rollouts = rollouts_of("a")
    rollouts = replace(rollouts, prompts=[replace(rollouts.prompts[0], metadata=odd)])
    assert remote(server.url).score(rollouts).valid.all()
    expected = {"nan": None, "array": [0, 1], "3": [1, "{2}"], "path": "x"}
    assert server.requests[0][0]["samples"][0]["metadata"] == expected == as_json(odd)


def test_parts_are_kept_null_is_nan_and_their_names_survive_a_failed_call(serve, rollouts_of):
    async def handle(request, body):
        if len(server.requests) > 1:
            return web.Response(status=500)
        return web.json_response({"scores": [1, 2.5], "parts": {"fluent": [0.5, None]}, "errors": ["one was odd"]})

    server = serve(handle)
    reward = remote(server.url)
    output = reward.score(rollouts_of("a", "b"))
    assert output.scores.tolist() == [1, 2.5]
    np.testing.assert_array_equal(output.parts["fluent"], [0.5, np.nan])
    assert output.errors == (f"remote {server.url}: one was odd",)
    output = reward.score(rollouts_of("a"))
    assert not output.valid.any()
    np.testing.assert_array_equal(output.parts["fluent"], [np.nan])


def test_a_server_names_64_parts_at_most_over_all_answers(serve, rollouts_of):
    async def handle(request, body):
        first = 40 * (len(server.requests) - 1)
        return web.json_response({"scores": [1], "parts": {f"p{i}": [0.5] for i in range(first, first + 40)}})

    server = serve(handle)
    reward = remote(server.url)
    assert reward.score(rollouts_of("a")).valid.all()
    output = reward.score(rollouts_of("a"))
    assert not output.valid.any()
    assert output.errors == (f"remote {server.url}: the server has named 80 parts, more than 64",)
    assert len(output.parts) == 40


def test_a_part_with_an_endless_name_makes_the_answer_unusable(serve, rollouts_of):
    server = serve(answer_json('{"scores": [1], "parts": {"' + "x" * 101 + '": [1]}}'))
    assert "has a name of more than 100 characters" in only_failure(remote(server.url), rollouts_of("a"))


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        ("NaN", "response 1 of 3: the score is nan"),
        ("Infinity", "response 1 of 3: the score is inf"),
        ("1e999", "response 1 of 3: the score is inf"),
        ('"0.5"', "response 1 of 3: the score is '0.5', not a number"),
        ("true", "response 1 of 3: the score is True, not a number"),
        ("[1]", "response 1 of 3: the score is [1], not a number"),
        ("1" + "0" * 400, "response 1 of 3: int too large to convert to float"),
        ("null", "1 of 3 scores are null, and the server does not say why"),
    ],
)
def test_one_score_that_is_no_number_is_invalid_alone(score, sentence, serve, rollouts_of):
    server = serve(answer_json(f'{{"scores": [1, {score}, 3]}}'))
    output = remote(server.url).score(rollouts_of("a", "b", "c"))
    np.testing.assert_array_equal(output.scores, [1, np.nan, 3])
    assert output.valid.tolist() == [True, False, True]
    assert output.errors == (f"remote {server.url}: {sentence}",)


@pytest.mark.parametrize(
    ("handle", "sentence"),
    [
        (answer_with(500, text="out of memory"), "status 500: out of memory"),
        (answer_with(503), "status 503"),
        (answer_with(429, headers={"Retry-After": "60"}), "status 429, asks to wait 60 s"),
        (answer_with(401), "status 401; the server does not accept the token, see token_env and token_file"),
        (answer_with(403), "status 403; the server does not accept the token, see token_env and token_file"),
        (answer_with(422, text="no such field"), "status 422: no such field"),
        (answer_with(204), "status 204"),
        (
            answer_with(307, headers={"Location": "http://127.0.0.1:9/score"}),
            "status 307; redirects are not followed, set url to the final address",
        ),
        (answer_with(text='{"scores": [1, 2]}'), "the answer is text/plain, not application/json"),
        (answer_json('{"scores": [1, 2'), "the answer is not JSON"),
        (answer_json("[" * 3000), "the answer is not JSON"),
        (answer_json(""), "the answer is not JSON"),
        (answer_json("[1, 2]"), "the answer is no object with a list of scores"),
        (answer_json('{"scores": 1}'), "the answer is no object with a list of scores"),
        (answer_json('{"scores": [1]}'), "the answer has 1 scores for 2 responses"),
        (answer_json('{"scores": [1, 2, 3]}'), "the answer has 3 scores for 2 responses"),
        (answer_json('{"scores": [1, 2], "parts": {"x": [1]}}'), "the answer has 1 x for 2 responses"),
        (answer_json('{"scores": [1, 2], "parts": {"x": 1}}'), "the answer has no list of x for 2 responses"),
        (answer_json('{"scores": [1, 2], "parts": [1]}'), "the answer's parts are no object, or its errors no list"),
        (
            answer_json('{"scores": [1, 2]' + " " * 5000 + "}"),
            "the answer has 5018 bytes, over max_response_bytes=4096",
        ),
    ],
)
def test_an_answer_that_cannot_be_used_makes_all_scores_invalid_for_one_sentence(handle, sentence, serve, rollouts_of):
    server = serve(handle)
    error = only_failure(remote(server.url), rollouts_of("a", "b"))
    assert error.startswith(f"remote {server.url}: 2 responses have no score: {sentence}")
    assert len(server.requests) == 1


async def hang(request, body):
    await asyncio.sleep(30)


async def drip(request, body):
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.05)


async def flood(request, body):
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" " * 1000)


async def hang_up(request, body):
    request.transport.close()
    return web.Response()


@pytest.mark.parametrize(
    ("handle", "sentence"),
    [
        (hang, "no answer within attempt_timeout_s=0.4"),
        (drip, "no answer within attempt_timeout_s=0.4"),
        (flood, "the answer is larger than max_response_bytes=4096"),
        (hang_up, "ServerDisconnectedError"),
    ],
)
def test_a_server_that_hangs_drips_floods_or_hangs_up_cannot_hold_the_caller(handle, sentence, serve, rollouts_of):
    assert sentence in only_failure(remote(serve(handle).url, **SHORT), rollouts_of("a", "b"))


def test_all_attempts_together_end_at_the_deadline(serve, rollouts_of):
    server = serve(hang)
    error = only_failure(remote(server.url, deadline_s=0.6, attempt_timeout_s=0.25, retries=50), rollouts_of("a"))
    assert "no answer within" in error
    assert 2 <= len(server.requests) <= 3


def test_the_deadline_is_one_for_all_requests_of_a_call(serve, rollouts_of):
    server = serve(hang)
    error = only_failure(remote(server.url, **SHORT, batch_size=1), rollouts_of(*["a"] * 80), num_errors=80)
    assert "no answer within attempt_timeout_s=0.4" in error
    assert 8 <= len(server.requests) <= 16


def test_what_was_not_asked_in_time_is_told_and_is_no_failure_of_the_server(serve, rollouts_of):
    server = serve(hang)
    reward = remote(server.url, deadline_s=0.5, batch_size=1, breaker_failures=9)
    output = reward.score(rollouts_of(*["a"] * 10))
    told = [error.split("no score: ")[1] for error in output.errors]
    assert told[-2:] == ["not asked, because deadline_s=0.5 was over before its turn"] * 2
    assert all("no answer within deadline_s=0.5" in error for error in told[:8])
    assert not reward._breaker.is_open


def test_the_deadline_cuts_an_attempt_that_may_last_longer(serve, rollouts_of):
    error = only_failure(remote(serve(drip).url, deadline_s=0.6, attempt_timeout_s=30.0, retries=5), rollouts_of("a"))
    assert error.endswith("no answer within deadline_s=0.6; last failure: none, the first attempt was under way")


def test_a_refused_connection_and_an_unknown_host_are_failures(rollouts_of):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "ClientConnectorError" in only_failure(remote(url), rollouts_of("a"))
    only_failure(remote("http://nowhere.invalid"), rollouts_of("a"))
    for url in ("http://127.0.0.1:99999", "http://a..b"):
        assert "the url is not valid" in only_failure(remote(url), rollouts_of("a"))


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(serve, rollouts_of):
    def failing(status, times):
        async def handle(request, body):
            if len(server.requests) <= times:
                return web.Response(status=status)
            return await lengths(request, body)

        return handle

    for status in (500, 502, 503, 429):
        server = serve(failing(status, times=2))
        output = remote(server.url, retries=2).score(rollouts_of("abc"))
        assert (output.scores.tolist(), output.errors, len(server.requests)) == ([3], (), 3)
    for status in (400, 401, 403, 404, 413, 302):
        server = serve(failing(status, times=2))
        assert f"status {status}" in only_failure(remote(server.url, retries=2), rollouts_of("abc"))
        assert len(server.requests) == 1


def test_a_server_that_asks_to_wait_is_not_asked_earlier_and_not_awaited_past_the_deadline(serve, rollouts_of):
    async def handle(request, body):
        if len(server.requests) == 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        return await lengths(request, body)

    server = serve(handle)
    started = time.monotonic()
    assert remote(server.url, retries=1).score(rollouts_of("abc")).scores.tolist() == [3]
    assert time.monotonic() - started >= 1
    server = serve(answer_with(503, headers={"Retry-After": "30"}))
    # It does not wait for what cannot come within its 20 s.
    assert "asks to wait 30 s" in only_failure(remote(server.url, retries=5), rollouts_of("abc"))
    assert len(server.requests) == 1


def test_retry_after_is_seconds_or_a_date():
    assert retry_after_s("7") == 7
    assert retry_after_s("") == retry_after_s("soon") == retry_after_s("-1") == 0
    assert 28 < retry_after_s(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert retry_after_s(formatdate(time.time() - 30, usegmt=True)) == 0


def test_one_failed_batch_leaves_the_others_alone(serve, rollouts_of):
    async def handle(request, body):
        is_bad = any(sample["response"] == "bad" for sample in body["samples"])
        return web.Response(status=500) if is_bad else await lengths(request, body)

    output = remote(serve(handle).url, batch_size=2).score(rollouts_of("a", "bb", "c", "bad", "e"))
    np.testing.assert_array_equal(output.scores, [1, 2, np.nan, np.nan, 1])
    assert len(output.errors) == 1


def test_at_most_eight_requests_run_at_a_time(serve, rollouts_of):
    running, peaks = [], []

    async def handle(request, body):
        running.append(request)
        peaks.append(len(running))
        await asyncio.sleep(0.05)
        running.pop()
        return await lengths(request, body)

    output = remote(serve(handle).url, batch_size=1).score(rollouts_of(*["a"] * 20))
    assert output.valid.all()
    assert 1 < max(peaks) <= 8


def test_the_breaker_opens_after_failures_in_a_row_and_one_success_forgets_them():
    now = 0.0
    breaker = CircuitBreaker(failures=3, reset_s=10.0, clock=lambda: now)
    for failed in (True, True, False, True, True):
        breaker.failed() if failed else breaker.succeeded()
        assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open and breaker.remaining_s == 10
    now = 4.0
    assert breaker.is_open and breaker.remaining_s == 6
    now = 12.0
    assert breaker.is_open and breaker.remaining_s == 0
    breaker.probed(is_healthy=False)
    assert breaker.is_open and breaker.remaining_s == 10
    now = 22.0
    breaker.probed(is_healthy=True)
    assert not breaker.is_open
    breaker.failed()  # the fourth in a row
    assert breaker.is_open and breaker.remaining_s == 10


def test_a_failing_server_is_left_alone_then_probed_and_asked_again_once_it_is_healthy(serve, rollouts_of):
    async def handle(request, body):
        return await lengths(request, body) if is_repaired else web.Response(status=500)

    is_repaired = False
    server = serve(handle, health_status=503)
    reward = remote(server.url, breaker_failures=2, breaker_reset_s=1.0)
    for _ in range(2):
        assert "status 500" in only_failure(reward, rollouts_of("a"))
    assert "not asked, because of failed batches in a row" in only_failure(reward, rollouts_of("a"))
    assert (len(server.requests), server.probes) == (2, 0)
    time.sleep(1.1)
    assert "not asked, because the health probe failed: status 503" in only_failure(reward, rollouts_of("a"))
    assert "not asked, because of failed batches in a row" in only_failure(reward, rollouts_of("a"))
    assert (len(server.requests), server.probes) == (2, 1)
    time.sleep(1.1)
    is_repaired, server.health_status = True, 200
    assert reward.score(rollouts_of("abc", "a")).scores.tolist() == [3, 1]
    assert (len(server.requests), server.probes) == (3, 2)


def test_the_token_is_sent_and_never_told(serve, rollouts_of, monkeypatch, tmp_path):
    async def handle(request, body):
        said = f"you sent {request.headers['Authorization']}"
        return web.Response(status=403, text=said) if len(server.requests) == 1 else await lengths(request, body)

    server = serve(handle)
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    reward = remote(server.url, token_env="REWARD_TOKEN")
    error = only_failure(reward, rollouts_of("a"))
    assert "you sent Bearer ***" in error and TOKEN not in error + repr(reward)
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert remote(server.url, token_file=str(tmp_path / "token")).score(rollouts_of("a")).valid.all()
    assert [headers["Authorization"] for _, headers in server.requests] == [f"Bearer {TOKEN}"] * 2


def test_a_token_does_not_follow_a_redirect(serve, rollouts_of, monkeypatch):
    other = serve(lengths)
    server = serve(answer_with(307, headers={"Location": other.url + "/score"}))
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    only_failure(remote(server.url, token_env="REWARD_TOKEN"), rollouts_of("a"))
    assert other.requests == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"token_env": "NO_SUCH_TOKEN"},
            "token is missing: this reward worker has not got the environment variable NO_",
        ),
        ({"token_file": "no/such/file"}, "token is missing: this reward worker has not got the file no/such/file"),
        ({"token_env": "EMPTY"}, "token is empty: write it into the environment variable EMPTY"),
        ({"token_env": "ODD"}, "token in the environment variable ODD has characters that no HTTP header can carry"),
        ({"token_env": "GOOD", "token_file": "x"}, "keep one of them"),
        (
            {"token_env": "GOOD", "url": "http://rewards.example.org:80"},
            "unencrypted to rewards.example.org; use https",
        ),
        ({"url": "https://me:s3cret-token@rewards.example.org"}, "url holds a user name or password"),
        ({"url": "https://rewards.example.org/?key=1"}, "must be a base address"),
        ({"url": "http://"}, "must be a base address"),
    ],
)
def test_a_token_or_url_that_cannot_be_used_is_refused_at_start_up(changes, sentence, monkeypatch):
    monkeypatch.setenv("EMPTY", " \n")
    monkeypatch.setenv("ODD", f"{TOKEN}\r\nX-Evil: 1")
    monkeypatch.setenv("GOOD", TOKEN)
    with pytest.raises(ValueError, match="the remote reward") as caught:
        remote(**{"url": "http://127.0.0.1:1", **changes})
    assert sentence in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://rewards.example.org", "http://localhost:1", "http://[::1]:1", "http://127.0.0.9"]
)
def test_a_token_may_go_over_https_or_stay_on_this_machine(url, monkeypatch):
    monkeypatch.setenv("GOOD", TOKEN)
    remote(url, token_env="GOOD")


def test_a_reward_may_be_called_where_an_event_loop_runs(serve, rollouts_of):
    server = serve(lengths)

    async def call():
        return remote(server.url).score(rollouts_of("abc"))

    assert asyncio.run(call()).scores.tolist() == [3]


def test_the_rewards_thread_ends_with_it():
    before = set(threading.enumerate())
    reward = remote("http://127.0.0.1:1")
    (thread,) = (t for t in threading.enumerate() if t not in before)
    del reward
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
