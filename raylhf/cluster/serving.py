"""A reward graph on Ray Serve: one endpoint that answers HTTP, and scorers behind it that share its requests."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from starlette.requests import Request
from starlette.responses import Response

from raylhf.cluster.actors import POLL_S, StopRequestedError, WorkerError
from raylhf.cluster.http_limits import CALLBACK_VARIABLE
from raylhf.cluster.session import preflight, ray_session
from raylhf.config.placement import Role
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.service import ServeConfig, ServiceConfig
from raylhf.rewards.endpoint import ScoreEndpoint, ScorerBusyError
from raylhf.rewards.texts import TextSample, rollouts_of_texts
from raylhf.rewards.wire import Scored, renumbered
from raylhf.rewards.worker import RewardWorker, rows_of

APPLICATION = "raylhf-reward"
OPEN_REQUESTS = 256
"""Requests that the endpoint works on at once; as many wait, and further ones are answered with 503."""
PROXY_SLACK_S = 10.0
"""The proxy's own deadline lies behind the endpoint's, which has the better sentence."""
WATCH_EVERY_S = 5.0


@dataclass(frozen=True)
class Piece:
    """Samples of one request that are scored in one batch."""

    samples: list[TextSample]
    first: int
    """Position of the first one in the request."""


@dataclass(frozen=True)
class ScoredPiece:
    """The scores of a piece, and the size of the batch that it came to lie in."""

    scored: Scored
    batch_size: int | None
    """Samples; None for all pieces of a batch but the first, so that each batch is counted once."""


def num_samples(pieces: Sequence[Piece]) -> int:
    """The size of a batch."""
    return sum(len(piece.samples) for piece in pieces)


class Scorer:
    """One replica: a reward worker, and Ray Serve's batching before it."""

    def __init__(
        self, config: RewardPlaneConfig, *, max_batch_size: int, batch_wait_s: float, stuck_after_s: float
    ) -> None:
        """`stuck_after_s` is how long a batch may be in work before the replica counts as stuck."""
        self._worker = RewardWorker(config)
        self._worker.start()
        self._stuck_after_s = stuck_after_s
        self._started_at: dict[object, float] = {}
        batching: Any = self.score  # the decorator's attributes, which its type does not tell
        batching.set_max_batch_size(max_batch_size)
        batching.set_batch_wait_timeout_s(batch_wait_s)

    @serve.batch(batch_size_fn=num_samples)
    async def score(self, pieces: list[Piece]) -> list[ScoredPiece]:
        """The scores of one piece, for each caller; Ray Serve gathers what waits."""
        return await self.score_pieces(pieces)

    async def score_pieces(self, pieces: Sequence[Piece]) -> list[ScoredPiece]:
        """The scores of each piece, of whichever requests; the worker's thread leaves the replica free to answer."""
        rollouts = rollouts_of_texts([sample for piece in pieces for sample in piece.samples])
        batch = object()
        self._started_at[batch] = time.monotonic()
        try:
            output, _ = await self._worker.score(rollouts)
        finally:
            del self._started_at[batch]
        results, start = [], 0
        for piece in pieces:
            rows = range(start, start + len(piece.samples))
            mine = rows_of(output, slice(rows.start, rows.stop), rollouts.select(rows))
            errors = tuple(renumbered(error, rows, piece.first) for error in mine.errors)
            results.append(ScoredPiece(Scored.of(replace(mine, errors=errors)), None if start else len(rollouts)))
            start = rows.stop
        return results

    def check_health(self) -> None:
        """Ray Serve asks this, and replaces a replica that fails several times in a row.

        Raises:
            RuntimeError: a batch is in work for longer than anybody waits for it.
        """
        age_s = time.monotonic() - min(self._started_at.values(), default=math.inf)
        if age_s > self._stuck_after_s:
            raise RuntimeError(f"the scorer is stuck: a batch is in work for {age_s:.0f} s")

    async def is_ready(self) -> bool:
        """Answered while a batch is scored: only a scorer that is gone or stuck does not."""
        self.check_health()
        return True


class Endpoint:
    """The deployment that Ray Serve's proxy hands every request to."""

    def __init__(self, config: ServeConfig, digest: bytes, scorer: Any) -> None:
        self._max_batch_size = config.max_batch_size
        self._scorer = scorer
        self._endpoint = ScoreEndpoint(config, digest, score=self._score, probe=self._probe)

    async def __call__(self, request: Request) -> Response:
        return await self._endpoint(request)

    async def _score(self, samples: list[TextSample]) -> Scored:
        """The scores of one request, in pieces that fit into a batch: they may go to different scorers."""
        size = self._max_batch_size
        pieces = [Piece(samples[first : first + size], first) for first in range(0, len(samples), size)]
        try:
            scored = await asyncio.gather(*(self._score_piece(piece) for piece in pieces))
        except (BackPressureError, RayActorError) as error:
            raise ScorerBusyError("no scorer can take the request; send it again") from error
        return Scored.joined(scored)

    async def _score_piece(self, piece: Piece) -> Scored:
        result = await self._scorer.score.remote(piece)
        if result.batch_size is not None:
            self._endpoint.metrics.batch_size.observe(result.batch_size)
        return result.scored

    async def _probe(self) -> None:
        await self._scorer.is_ready.remote()


def reward_application(config: ServiceConfig, digest: bytes) -> serve.Application:
    """The two deployments of a reward, bound together."""
    reward, settings = config.reward, config.serve
    scorer = serve.deployment(
        name="scorer",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        },
        # One batch in work and one that fills up, even if every call is a single sample.
        max_ongoing_requests=max(2 * settings.max_batch_size, round(2 * settings.target_ongoing_requests)),
        # Beyond these a request is told to come again (503); the longest request always fits.
        max_queued_requests=max(OPEN_REQUESTS, math.ceil(settings.max_samples_per_request / settings.max_batch_size)),
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={
            "num_cpus": reward.num_cpus,
            "num_gpus": reward.num_gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(reward.threads)}},
        },
    )(Scorer)
    endpoint = serve.deployment(
        name="endpoint",
        num_replicas=1,  # its metrics are counted in one process
        max_ongoing_requests=OPEN_REQUESTS,
        max_queued_requests=OPEN_REQUESTS,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(Endpoint)
    bound = scorer.bind(
        config.scoring,
        max_batch_size=settings.max_batch_size,
        batch_wait_s=settings.batch_wait_s,
        stuck_after_s=settings.request_timeout_s,
    )
    return endpoint.bind(settings, digest, bound)


@contextmanager
def served_reward(
    config: ServiceConfig, digest: bytes, *, env: Mapping[str, str], should_stop: Callable[[], bool]
) -> Iterator[None]:
    """Serve the reward of `config` to whoever has the token of `digest`; entered when it answers, ended after.

    `env` is the environment of all processes.

    Raises:
        ValueError: no node can hold a scorer, or the reward cannot be built.
        WorkerError: Ray, Ray Serve or a scorer failed, or was not ready within cluster.start_timeout_s.
        StopRequestedError: `should_stop` became true before the reward was ready.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with ray_session(config.cluster, env={**env, **CALLBACK_VARIABLE}):
        preflight([Role("reward", config.serve.min_replicas, config.reward.num_cpus, config.reward.num_gpus)])
        _require_no_other_serve()
        try:
            _start_proxy(config.serve)
            target = serve.RunTarget(reward_application(config, digest), name=APPLICATION, route_prefix="/")
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            _wait_until_ready(config.cluster.start_timeout_s, should_stop)
            yield
        finally:
            _end(config.cluster.address is not None)


def _end(is_joined: bool) -> None:
    """End the application, requests in work answered first. Ray Serve itself ends with a Ray of our own."""
    with suppress(RayError, RayServeException):  # where Ray Serve is gone there is nothing to end
        serve.delete(APPLICATION)
        if is_joined:
            serve.shutdown()


def watch(*, should_stop: Callable[[], bool]) -> None:
    """Return when `should_stop` becomes true; a WorkerError says that Ray Serve is gone."""
    looked_at = time.monotonic()
    while not should_stop():
        time.sleep(POLL_S)
        if time.monotonic() - looked_at >= WATCH_EVERY_S:
            looked_at = time.monotonic()
            if _application() is None:
                raise WorkerError("Ray Serve has lost the reward: somebody else shut it down")


def _require_no_other_serve() -> None:
    if serve.status().proxies:
        raise ValueError(
            "Ray Serve runs on this cluster already, and its address cannot be changed from here; end it with "
            "`serve shutdown`, or set cluster.address: null to serve from this machine"
        )


def _start_proxy(settings: ServeConfig) -> None:
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.request_timeout_s + PROXY_SLACK_S,
        },
    )


def _application() -> ApplicationStatusOverview | None:
    try:
        return serve.status().applications.get(APPLICATION)
    except (RayError, RayServeException) as error:
        raise WorkerError(f"Ray Serve is gone: {error}") from error


def _wait_until_ready(timeout_s: float, should_stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if should_stop():
            raise StopRequestedError("starting the reward")
        application = _application()
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        messages = [] if application is None else [d.message for d in application.deployments.values()]
        # Ray Serve builds a replica several times before it gives up; a mistake of the user's is not worth the wait.
        if mistakes := re.findall(r"^ValueError: (.+)$", "\n".join(messages), flags=re.MULTILINE):
            raise ValueError(f"the reward cannot be built: {mistakes[-1]}")
        if application is not None and application.status in (
            ApplicationStatus.DEPLOY_FAILED,
            ApplicationStatus.UNHEALTHY,
        ):
            raise WorkerError(f"the reward did not start: {application.message} {' '.join(messages)}")
        if time.monotonic() > deadline:
            raise WorkerError(f"the reward was not ready within cluster.start_timeout_s = {timeout_s:g} s. {messages}")
        time.sleep(POLL_S)
