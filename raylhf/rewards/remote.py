"""Scores from a server over HTTP. docs/reward_protocol.md describes what goes over the wire."""

import asyncio
import json
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from raylhf.batch import RewardOutput, Rollouts
from raylhf.rewards.breaker import CircuitBreaker
from raylhf.rewards.remote_address import checked_url, read_token
from raylhf.rewards.validity import all_invalid, as_score

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from tenacity import RetryCallState

PROTOCOL_VERSION = 1
MAX_PARALLEL_REQUESTS = 8
MAX_ERROR_CHARACTERS = 200
"""Of a sentence that a server says about a failure."""
MAX_ERRORS = 32
"""Sentences of one answer that are kept."""
MAX_PARTS = 64
"""Names of parts that a server may use, over all answers: each is a metric for as long as the run lasts."""
MAX_PART_NAME_CHARACTERS = 100


class Refused(Exception):
    """The server's answer cannot be used, and would be no better the next time."""


class Unavailable(Exception):
    """No answer this time. `retry_after_s` is what the server asks to wait, 0 where it says nothing."""

    def __init__(self, sentence: str, retry_after_s: float = 0.0):
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Reply:
    """What one request gave, for n responses."""

    scores: list[float]
    """NaN where invalid, n."""
    parts: dict[str, list[float]]
    """Scores of named parts, n each."""
    errors: list[str]


class RemoteReward:
    """Scores by a server that speaks the reward protocol.

    The responses are cut into requests, a few of which run at a time. A call of `score` ends after `deadline_s` at the
    latest; the responses of a request that has no answer by then are invalid, for one sentence.
    """

    def __init__(
        self,
        *,
        url: str,
        token_env: str | None,
        token_file: str | None,
        deadline_s: float,
        attempt_timeout_s: float,
        retries: int,
        batch_size: int,
        max_response_bytes: int,
        breaker_failures: int,
        breaker_reset_s: float,
    ):
        self._token = read_token(token_env, token_file)
        self._url = checked_url(url, has_token=self._token is not None)
        self._deadline_s = deadline_s
        self._attempt_timeout_s = attempt_timeout_s
        self._retries = retries
        self._batch_size = batch_size
        self._max_response_bytes = max_response_bytes
        self._breaker = CircuitBreaker(failures=breaker_failures, reset_s=breaker_reset_s)
        self._probing = asyncio.Lock()
        self._part_names: dict[str, None] = {}
        self._loop = start_event_loop()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def score(self, rollouts: Rollouts) -> RewardOutput:
        deadline = self._loop.time() + self._deadline_s
        # In a loop of its own, as asyncio.run would wait for a name look-up that hangs in a thread.
        replies = asyncio.run_coroutine_threadsafe(self._score(rollouts, deadline), self._loop).result()
        names = self._part_names | dict.fromkeys(name for reply in replies for name in reply.parts)
        if len(names) > MAX_PARTS:
            sentence = f"remote {self._url}: the server has named {len(names)} parts, more than {MAX_PARTS}"
            return all_invalid(len(rollouts), sentence, self._part_names)
        self._part_names = names
        scores = np.array([score for reply in replies for score in reply.scores], dtype=np.float64)
        return RewardOutput(
            scores=scores,
            valid=np.isfinite(scores),
            parts={  # the names stay when a call fails, so that outputs can be joined
                name: np.array([v for r in replies for v in r.parts.get(name, [math.nan] * len(r.scores))])
                for name in self._part_names
            },
            errors=tuple(f"remote {self._url}: {self._redacted(error)}" for r in replies for error in r.errors),
        )

    async def _score(self, rollouts: Rollouts, deadline: float) -> list[Reply]:
        import aiohttp

        slots = asyncio.Semaphore(MAX_PARALLEL_REQUESTS)
        # Nothing is unpacked: a small compressed body could grow past every limit.
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._attempt_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            auto_decompress=False,
        ) as session:

            async def reply_to(samples: list[dict[str, Any]]) -> Reply:
                async with slots:
                    return await self._score_batch(session, samples, deadline)

            samples = [as_sample(rollouts, i) for i in range(len(rollouts))]
            starts = range(0, len(samples), self._batch_size)
            return await asyncio.gather(*(reply_to(samples[i : i + self._batch_size]) for i in starts))

    async def _score_batch(self, session: "ClientSession", samples: list[dict[str, Any]], deadline: float) -> Reply:
        """One request with its attempts, until `deadline` on the loop's clock. A failure is a reply without scores."""
        left_s = deadline - self._loop.time()
        if left_s <= 0:  # the server was not asked, so the breaker is not told
            sentence = f"not asked, because deadline_s={self._deadline_s:g} was over before its turn"
            return failed_reply(len(samples), sentence)
        body = json.dumps({"version": PROTOCOL_VERSION, "samples": samples}, allow_nan=False).encode()
        attempts = Attempts(retries=self._retries, deadline_s=left_s)
        try:
            async with asyncio.timeout_at(deadline):
                if sentence := await self._reason_to_wait(session):
                    return failed_reply(len(samples), sentence)
                answer = await attempts.run(partial(self._post, session, body))
            reply = parse_reply(answer, len(samples))
        except TimeoutError:
            self._breaker.failed()
            sentence = f"no answer within deadline_s={self._deadline_s:g}; last failure: {attempts.last_failure}"
            return failed_reply(len(samples), sentence)
        except (Refused, Unavailable) as error:
            self._breaker.failed()
            return failed_reply(len(samples), str(error))
        self._breaker.succeeded()
        return reply

    async def _reason_to_wait(self, session: "ClientSession") -> str | None:
        """None if the server may be asked, which after a pause takes a look at its health."""
        async with self._probing:
            if not self._breaker.is_open:
                return None
            if wait_s := self._breaker.remaining_s:
                return f"not asked, because of failed batches in a row; its health is probed in {wait_s:.1f} s"
            try:
                await self._exchange(session, "GET", "/health")
            except (Refused, Unavailable) as error:
                self._breaker.probed(is_healthy=False)
                return f"not asked, because the health probe failed: {error}"
            self._breaker.probed(is_healthy=True)
            return None

    async def _post(self, session: "ClientSession", body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return await self._exchange(session, "POST", "/score", data=body, headers=headers)

    async def _exchange(self, session: "ClientSession", method: str, path: str, **options: Any) -> Any:
        """The JSON value of a 200; Unavailable where another attempt may help, else Refused."""
        import aiohttp

        try:
            async with session.request(method, self._url + path, allow_redirects=False, **options) as response:
                body = await read_limited(response, self._max_response_bytes)
                raise_for_status(response, body)
                if response.content_type != "application/json":
                    raise Refused(f"the answer is {response.content_type}, not application/json")
        except TimeoutError as error:
            raise Unavailable(f"no answer within attempt_timeout_s={self._attempt_timeout_s:g}") from error
        except (aiohttp.InvalidURL, UnicodeError) as error:  # the latter from a host name such as a..b
            raise Refused("the url is not valid") from error
        except aiohttp.ClientError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the answer is not JSON: {error}") from error

    def _redacted(self, sentence: str) -> str:
        """A server may repeat what it was sent."""
        return sentence if self._token is None else sentence.replace(self._token, "***")


class Attempts:
    """A request's attempts: jittered waits that grow, or what the server asks for; none that would end too late."""

    def __init__(self, *, retries: int, deadline_s: float):
        self._retries = retries
        self._deadline_s = deadline_s
        self.last_failure = "none, the first attempt was under way"

    async def run(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """The first attempt's value that is no Unavailable."""
        from tenacity import (
            AsyncRetrying,
            retry_if_exception_type,
            stop_after_attempt,
            stop_before_delay,
            wait_random_exponential,
        )

        backoff = wait_random_exponential(multiplier=0.25, max=10.0)

        def wait_s(state: "RetryCallState") -> float:
            assert state.outcome is not None
            failure = state.outcome.exception()
            assert isinstance(failure, Unavailable)
            self.last_failure = str(failure)
            return max(failure.retry_after_s, backoff(state))

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_attempt(1 + self._retries) | stop_before_delay(self._deadline_s),
            wait=wait_s,
            reraise=True,
        )
        return await retrying(attempt)


def start_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own, until it is stopped."""

    def run(loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        loop.close()

    loop = asyncio.new_event_loop()
    threading.Thread(target=run, args=(loop,), name="remote-reward", daemon=True).start()
    return loop


def as_sample(rollouts: Rollouts, i: int) -> dict[str, Any]:
    """What the server is told of response i."""
    prompt = rollouts.prompts[i]
    return {
        "prompt": [as_json(message) for message in prompt.messages],
        "response": rollouts.response_texts[i],
        "metadata": as_json(prompt.metadata),
        "is_truncated": rollouts.finish_reasons[i] == "length",
        "num_tokens": len(rollouts.response_ids[i]),
    }


def as_json(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, NaN and infinities as null, what else it lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


async def read_limited(response: "ClientResponse", max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be larger."""
    if (response.content_length or 0) > max_bytes:
        raise Refused(f"the answer has {response.content_length} bytes, over max_response_bytes={max_bytes}")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise Refused(f"the answer is larger than max_response_bytes={max_bytes}")
    return bytes(body)


def raise_for_status(response: "ClientResponse", body: bytes) -> None:
    """Unavailable or Refused for any status but 200, with the beginning of what the server says."""
    status = response.status
    if status == 200:
        return
    said = " ".join(body[: 4 * MAX_ERROR_CHARACTERS].decode(errors="replace").split())[:MAX_ERROR_CHARACTERS]
    sentence = f"status {status}" + (f": {said}" if said else "")
    if status == 429 or status >= 500:
        wait_s = retry_after_s(response.headers.get("Retry-After", ""))
        raise Unavailable(f"{sentence}, asks to wait {wait_s:.0f} s" if wait_s else sentence, wait_s)
    if 300 <= status < 400:
        raise Refused(f"{sentence}; redirects are not followed, set url to the final address")
    if status in (401, 403):
        raise Refused(f"{sentence}; the server does not accept the token, see token_env and token_file")
    raise Refused(sentence)


def retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 for anything else."""
    try:
        wait_s = float(header) if header.strip().isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0
    return max(0.0, wait_s)


def parse_reply(answer: Any, num_responses: int) -> Reply:
    """Checks an answer of protocol version 1. One bad score is invalid by itself; a bad shape refuses the answer."""
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
        raise Refused("the answer is no object with a list of scores")
    parts, said = answer.get("parts") or {}, answer.get("errors") or []
    if not isinstance(parts, dict) or not isinstance(said, list):
        raise Refused("the answer's parts are no object, or its errors no list")
    if too_long := [name for name in parts if len(name) > MAX_PART_NAME_CHARACTERS]:
        raise Refused(f"the part {too_long[0][:20]}... has a name of more than {MAX_PART_NAME_CHARACTERS} characters")
    for name, values in {"scores": answer["scores"], **parts}.items():
        if not isinstance(values, list) or len(values) != num_responses:
            count = len(values) if isinstance(values, list) else "no list of"
            raise Refused(f"the answer has {count} {name} for {num_responses} responses")
    errors = [str(error)[:MAX_ERROR_CHARACTERS] for error in said[:MAX_ERRORS]]
    scores = [as_number(value) for value in answer["scores"]]
    errors += [f"response {i} of {num_responses}: {error}" for i, (_, error) in enumerate(scores) if error]
    if not errors and (num_missing := answer["scores"].count(None)):
        errors = [f"{num_missing} of {num_responses} scores are null, and the server does not say why"]
    return Reply(
        scores=[score for score, _ in scores],
        parts={str(name): [as_number(value)[0] for value in values] for name, values in parts.items()},
        errors=errors,
    )


def as_number(value: Any) -> tuple[float, str | None]:
    """The score; or NaN and why, where it is not null, for which the server has its own sentence."""
    if value is None:
        return math.nan, None
    if isinstance(value, bool):
        return math.nan, f"the score is {value}, not a number"
    try:
        return as_score(value), None
    except (TypeError, ValueError, OverflowError) as error:
        return math.nan, str(error)[:MAX_ERROR_CHARACTERS]


def failed_reply(num_responses: int, sentence: str) -> Reply:
    """No score for any response, for one reason."""
    return Reply([math.nan] * num_responses, {}, [f"{num_responses} responses have no score: {sentence}"])
