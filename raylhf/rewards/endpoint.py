"""A reward over HTTP, whatever the server: who may ask, how much, by when, and what is counted.

The endpoint is handed the scoring itself as a coroutine; `raylhf.cluster.serving` puts it on Ray Serve.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from raylhf.config.service import ServeConfig
from raylhf.rewards.texts import TextSample
from raylhf.rewards.wire import RequestError, Scored, parse_request

PROBE_TIMEOUT_S = 5.0
"""For the scorer's answer to a question about its health."""
PROBE_EVERY_S = 1.0
"""Health may be asked without a token, so the scorer is not asked more often than this."""
MAX_ERROR_CHARACTERS = 300
"""Of what the scorer says about its own failure."""
MIN_TOKEN_CHARACTERS = 16
TOKEN_REMEDY = 'make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`'
METHODS = {"/score": "POST", "/metrics": "GET", "/health": "GET"}

log = logging.getLogger(__name__)


class ScorerBusyError(Exception):
    """No scorer takes the request at the moment; it may be sent again."""


def read_token(settings: ServeConfig) -> str:
    """The bearer token that callers must show; a ValueError says where it was looked for, never what it is."""
    if settings.token_file is not None:
        where = f"serve.token_file={settings.token_file!r}"
        try:
            token = Path(settings.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read ({error}); {TOKEN_REMEDY}, and write it there") from None
    else:
        where = f"the environment variable {settings.token_env} (serve.token_env)"
        token = os.environ.get(settings.token_env, "").strip()
    if not token:
        raise ValueError(f"{where} holds no token, and nobody may score without one; {TOKEN_REMEDY}, and put it there")
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ValueError(
            f"the token in {where} has {len(token)} characters, fewer than {MIN_TOKEN_CHARACTERS}, and could be "
            f"guessed; {TOKEN_REMEDY}"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the token in {where} has characters that no HTTP header carries; {TOKEN_REMEDY}")
    return token


def token_digest(token: str) -> bytes:
    """What the endpoint keeps of the token: enough to recognise it, of one length whatever the token's."""
    return hashlib.sha256(token.encode()).digest()


class ScoreEndpoint:
    """Answers POST /score, GET /metrics and GET /health."""

    def __init__(
        self,
        config: ServeConfig,
        digest: bytes,
        score: Callable[[list[TextSample]], Awaitable[Scored]],
        probe: Callable[[], Awaitable[object]],
    ) -> None:
        """`digest` is of the token that opens all but /health; `probe` returns when the scorer answers."""
        self._config = config
        self._digest = digest
        self._score = score
        self._probe = probe
        self._probe_lock = asyncio.Lock()
        self._probed_at = -PROBE_EVERY_S
        self._is_healthy = False
        self.metrics = EndpointMetrics()

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if path not in METHODS:
            return _refusal(404, f"there are {', '.join(METHODS)} here")
        if request.method != METHODS[path]:
            return _refusal(405, f"{path} takes {METHODS[path]}", {"Allow": METHODS[path]})
        if path == "/health":
            return await self._health()
        if path == "/metrics":
            return self.metrics.page() if self._is_authorized(request) else _unauthorized()
        started, status = time.perf_counter(), "none"
        try:
            response = await self._answer(request) if self._is_authorized(request) else _unauthorized()
            status = str(response.status_code)
            return response
        finally:  # a request that is cancelled is counted as well
            self.metrics.requests.labels(status=status).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)

    def _is_authorized(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # Digests of one length, compared in constant time: neither the length nor the first wrong byte can be timed.
        return hmac.compare_digest(token_digest(token.strip()), self._digest) and scheme.lower() == "bearer"

    async def _answer(self, request: Request) -> Response:
        """The answer to an authorized request; every failure is a status and a sentence."""
        limit_s = self._config.request_timeout_s
        body = None
        try:
            async with asyncio.timeout(limit_s):
                body = await read_body(request, max_bytes=self._config.max_request_bytes)
                samples = parse_request(body, max_samples=self._config.max_samples_per_request)
                scored = await self._score(samples) if samples else Scored([], {}, [])
            answer = Answer(scored.answer())
            self.metrics.count(scored)
            return answer
        except RequestError as error:
            return _refusal(error.status, error.sentence)
        except ClientDisconnect:
            return _refusal(400, "the connection was closed before the whole body was there")
        except TimeoutError:
            if body is None:
                return _refusal(408, f"the body was not there within {limit_s:g} s")
            return _refusal(
                504, f"no scores within {limit_s:g} s; send fewer samples, or raise serve.request_timeout_s"
            )
        except ScorerBusyError as error:
            return _refusal(503, str(error), {"Retry-After": "1"})
        except Exception as error:  # the scorer's own failure; the server goes on, and the caller is told
            log.exception("scoring failed")
            said = next(iter(str(error).splitlines()), "")[:MAX_ERROR_CHARACTERS]
            return _refusal(500, f"scoring failed: {type(error).__name__}" + (f": {said}" if said else ""))

    async def _health(self) -> Response:
        async with self._probe_lock:
            if time.monotonic() - self._probed_at >= PROBE_EVERY_S:
                self._is_healthy = await self._scorer_answers()
                self._probed_at = time.monotonic()
        if self._is_healthy:
            return Answer({"status": "ok"})
        return Answer({"status": "the scorer does not answer"}, status_code=503)

    async def _scorer_answers(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._probe()
        except Exception:  # whatever it is, the scorer did not answer
            log.warning("the scorer does not answer", exc_info=True)
            return False
        return True


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The body, given up with status 413 as soon as it is longer than `max_bytes`, announced or not."""
    announced = request.headers.get("content-length", "")
    pieces, size = [], int(announced[:19]) if announced.isdecimal() else 0
    if size <= max_bytes:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > max_bytes:
                break
            pieces.append(piece)
    if size > max_bytes:
        raise RequestError(413, f"the body is longer than {max_bytes} bytes; send fewer samples at a time")
    return b"".join(pieces)


def require_free_port(host: str, port: int) -> None:
    """Raises: ValueError: this machine cannot listen on the address (Ray Serve would only log it)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on serve.host={host!r}, serve.port={port}: {error.strerror}; choose another, for instance "
            f"serve.port={port + 1 if port < 65_535 else port - 1}"
        ) from None


class EndpointMetrics:
    """Counts in Prometheus's text format."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("raylhf_reward_requests", "Requests to /score.", ["status"], registry=registry)
        self.samples = Counter("raylhf_reward_samples", "Samples that got an answer.", registry=registry)
        self.invalid = Counter(
            "raylhf_reward_invalid_scores",
            "Samples without a score, by part; the part `score` is the whole reward.",
            ["part"],
            registry=registry,
        )
        self.seconds = Histogram(
            "raylhf_reward_request_seconds",
            "Time from a request's headers to its answer.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=registry,
        )
        self.batch_size = Histogram(
            "raylhf_reward_batch_size",
            "Samples scored together.",
            buckets=[2**i for i in range(11)],
            registry=registry,
        )

    def count(self, scored: Scored) -> None:
        """Add one answer."""
        self.samples.inc(len(scored))
        for part, scores in {**scored.parts, "score": scored.scores}.items():
            self.invalid.labels(part=part).inc(scores.count(None))

    def page(self) -> Response:
        """The page that Prometheus reads."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Answer(JSONResponse):
    """JSON in UTF-8 whatever the sentences hold: half of a surrogate pair, which UTF-8 lacks, becomes `?`."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """An error. The connection is closed with it, so that the rest of a body is not waited for."""
    return Answer({"error": sentence}, status_code=status, headers={"Connection": "close", **(headers or {})})


def _unauthorized() -> Response:
    return _refusal(401, "unauthorized", {"WWW-Authenticate": "Bearer"})
