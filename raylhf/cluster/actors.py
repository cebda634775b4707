"""Plain worker classes as Ray actors, in groups, with a deadline on every wait."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

POLL_S = 0.5
FETCH_TIMEOUT_S = 300.0
"""For moving a value that exists already; Ray would wait for a lost node for ever."""


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time. The message names it and the phase."""


class _Host:
    """Runs one plain worker in an actor."""

    def __init__(self, build: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._worker = build(*args, **kwargs)

    def node_ip(self) -> str:
        return ray.util.get_node_ip_address()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._worker, method)(*[_fetched(arg) for arg in args], **kwargs)


class _AsyncHost:
    """Runs one plain worker whose methods are coroutines; many calls are in flight at once."""

    def __init__(self, build: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._worker = build(*args, **kwargs)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._worker, method)(*args, **kwargs)
        return await result if asyncio.iscoroutine(result) else result


def _fetched(argument: Any) -> Any:
    """The values behind a list of references: Ray itself resolves only references that stand alone."""
    if isinstance(argument, list) and argument and isinstance(argument[0], ray.ObjectRef):
        return ray.get(argument, timeout=FETCH_TIMEOUT_S)
    return argument


@dataclass(frozen=True)
class ActorGroup:
    """The workers of one role."""

    role: str
    actors: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.actors)

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        """Call one worker without waiting; returns a reference, or a list of them."""
        return self.actors[index].call.options(num_returns=num_returns).remote(method, *args, **kwargs)

    def submit_all(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call every worker without waiting; references by worker name."""
        return {self.name(i): self.submit(i, method, *args, **kwargs) for i in range(len(self))}

    def call_all(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """Call every worker and wait for all of them."""
        return gather(self.submit_all(method, *args, **kwargs), phase=method, timeout_s=timeout_s)

    def node_ip(self, index: int) -> Any:
        """Reference to the address of the node that a worker runs on."""
        return self.actors[index].node_ip.remote()

    def name(self, index: int) -> str:
        return f"{self.role} {index}"

    def kill(self) -> None:
        """End the workers' processes at once."""
        for actor in self.actors:
            ray.kill(actor)


def start_group(
    role: str,
    build: Callable[..., Any],
    arguments: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    *,
    num_cpus: float,
    num_gpus: float,
    env: Mapping[str, str],
    is_async: bool = False,
) -> ActorGroup:
    """One actor for each entry of `arguments` (positional and keyword arguments of `build`). Does not wait."""
    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": dict(env)},
        "max_restarts": 0,
    }
    if is_async:
        options["max_concurrency"] = 10_000
    host = ray.remote(**options)(_AsyncHost if is_async else _Host)
    return ActorGroup(role, tuple(host.remote(build, args, kwargs) for args, kwargs in arguments))


def gather(
    references: Mapping[str, Any],
    *,
    phase: str,
    timeout_s: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """The values of `references` (by worker name), in order.

    Raises:
        WorkerError: a worker raised, died, or did not answer within the deadline; it and the others are named.
        StopRequestedError: `should_stop` became true while waiting.
    """
    pending = dict(references)
    deadline = time.monotonic() + timeout_s
    while pending:
        if should_stop():
            raise StopRequestedError(phase)
        done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=POLL_S, fetch_local=False)
        finished = set(done)
        for name in [name for name, reference in pending.items() if reference in finished]:
            _raise_failure(name, pending.pop(name), phase)
        if pending and time.monotonic() > deadline:
            raise WorkerError(f"{phase}: no answer from {', '.join(sorted(pending))} within {timeout_s:g} s")
    return [ray.get(reference, timeout=FETCH_TIMEOUT_S) for reference in references.values()]


class StopRequestedError(Exception):
    """The user asked the run to stop while the driver was waiting."""


def _raise_failure(name: str, reference: Any, phase: str) -> None:
    try:
        ray.get(reference, timeout=FETCH_TIMEOUT_S)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):  # the user's mistake: the sentence is enough
            raise ValueError(f"{name}, {phase}: {cause}") from None
        raise WorkerError(f"{name} failed in {phase}: {type(cause).__name__}: {cause}\n{error}") from None
    except RayError as error:
        raise WorkerError(f"{name} died in {phase}: {error}") from None


def value_of(reference: Any) -> Any:
    """Fetch one value to the driver (samples for people to read; not tokens or tensors)."""
    return ray.get(reference, timeout=FETCH_TIMEOUT_S)
