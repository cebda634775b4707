"""Plain worker classes as Ray actors, in groups, with a deadline on every wait."""

import asyncio
import faulthandler
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from raylhf.failures import BrokenWorkerError, ResponsesLostError
from raylhf.tracking.redaction import RedactedStream

START_OF_LOG = "--- process"
"""Begins a worker's output; its log goes on over the processes that take each other's place."""
START = "start"
"""The worker's method that makes it ready for the others."""
POLL_S = 0.5
FETCH_TIMEOUT_S = 300.0
"""For moving a value that exists already; Ray would wait for a lost node for ever."""
HERE_TIMEOUT_S = 5.0
"""For reading a value that was fetched just before."""
GRACE_S = 5.0
"""After a failure, how long the others are waited for: whose process ended is told from who only lost contact."""
DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)
"""What Ray raises for a call to a process that is gone."""
LOST_VALUES = (ObjectLostError, GetTimeoutError, *DEATHS)
"""What Ray raises in a call, for an argument whose process or node is gone."""


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time. The message names it and the phase."""


class WorkersLostError(WorkerError):
    """Processes of workers ended, or did not answer in time: others can take their place."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)
        """The workers."""


class StopRequestedError(Exception):
    """The user asked the run to stop while the driver was waiting."""


class Trouble(Enum):
    """Why a call has no value."""

    MISTAKE = "mistake"
    """The user's: the sentence is enough."""
    FAILED = "failed"
    """The worker raised."""
    DIED = "died"
    """Its process ended, or it says that it cannot go on."""
    LOST_DATA = "lost data"
    """An argument was on a node that is gone, or responses were given up; the worker itself is well."""


LOSSES = (Trouble.DIED, Trouble.LOST_DATA)
"""What takes a worker away from who asked it something: an answer lies where the worker is until it is fetched."""


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    value: Any = None
    trouble: Trouble | None = None
    reason: str = ""
    """The error in words, where there is trouble."""


@dataclass(frozen=True)
class Held:
    """Stands for the values that `hold` fetched: an argument of a later call."""


@dataclass(frozen=True)
class Identity:
    """Where a worker's process is."""

    node_id: str
    node_ip: str
    pid: int


class _Process:
    """What every actor can do beside its worker's methods."""

    def __init__(self, log_file: str | None) -> None:
        if log_file is not None:
            _log_to(Path(log_file))

    def identity(self) -> Identity:
        context = ray.get_runtime_context()
        return Identity(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())


class _Host(_Process):
    """Runs one plain worker in an actor."""

    def __init__(
        self, log_file: str | None, build: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__(log_file)
        self._worker = build(*args, **kwargs)
        self._held: list[list[Any]] = []

    def hold(self, *lists: list[Any]) -> list[int]:
        """Fetch lists of references for a later call; returns the places at which a value is lost.

        A call that fetches for itself would fail alone, in the middle of a collective that the other ranks are in.
        """
        everything = [reference for references in lists for reference in references]
        unreachable = []
        if everything:  # all at once: fetched one by one, each lost one would cost its own deadline
            _, unreachable = ray.wait(
                everything, num_returns=len(everything), timeout=FETCH_TIMEOUT_S, fetch_local=True
            )
        given_up = set(unreachable)
        self._held, lost = [], set()
        for references in lists:
            values = []
            for place, reference in enumerate(references):
                if reference in given_up:
                    lost.add(place)
                    continue
                try:
                    values.append(ray.get(reference, timeout=HERE_TIMEOUT_S))
                except (ObjectLostError, GetTimeoutError):
                    lost.add(place)
            self._held.append(values)
        return sorted(lost)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Held):
            args, self._held = (*self._held, *args[1:]), []
        result = getattr(self._worker, method)(*args, **kwargs)
        if method == START:
            _keep_all()
        return result


class _AsyncHost(_Process):
    """Runs one plain worker whose methods are coroutines; many calls are in flight at once."""

    def __init__(
        self, log_file: str | None, build: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__(log_file)
        self._worker = build(*args, **kwargs)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._worker, method)(*args, **kwargs)
        if asyncio.iscoroutine(result):
            result = await result
        if method == START:
            _keep_all()
        return result


def _keep_all() -> None:
    """Have Python's garbage collection look no more at what there is now: modules and models, which stay to the end.

    Going over the million objects of torch, transformers and vLLM stops a worker for half a second every few steps.
    """
    gc.collect()
    gc.freeze()


def _log_to(file: Path) -> None:
    """Send what this process and its children write to `file`, with the stack of a crash that Python cannot tell.

    On a node that cannot write there it goes to Ray's own logs, as without `file`.
    """
    faulthandler.enable()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"cannot write {file} on this node ({error})", file=sys.stderr)
        return
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    # Ray has put streams of its own in their place, which write elsewhere.
    sys.stdout, sys.stderr = RedactedStream(1), RedactedStream(2)
    os.write(2, f"{START_OF_LOG} {os.getpid()} starts at {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    faulthandler.enable(2)


@dataclass(frozen=True)
class Launcher:
    """How to make an actor of a role."""

    role: str
    build: Callable[..., Any]
    """Makes the plain worker, in the actor's process."""
    num_cpus: float
    num_gpus: float
    env: Mapping[str, str]
    log_folder: Path | None = None
    """Where each worker's output goes, as `role-number.log`."""
    is_async: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    options_of: Callable[[int], dict[str, Any]] = lambda number: {}
    """Further options of Ray for a worker, such as its place in a placement group."""

    def launch(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Start worker `number`, built with the given arguments. Does not wait; returns the actor."""
        options: dict[str, Any] = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "runtime_env": {"env_vars": dict(self.env)},
            "resources": dict(self.resources),
            "max_restarts": 0,
            **self.options_of(number),
        }
        if self.is_async:
            options["max_concurrency"] = 10_000
        host = ray.remote(**options)(_AsyncHost if self.is_async else _Host)
        log_file = None if self.log_folder is None else str(self.log_file(number))
        return host.remote(log_file, self.build, args, kwargs)

    def log_file(self, number: int) -> Path:
        """Where worker `number` writes."""
        assert self.log_folder is not None, f"{self.role} has no log folder"
        return self.log_folder / f"{self.role}-{number}.log"


def submit(actor: Any, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
    """Call a worker without waiting; returns a reference, or a list of them."""
    return actor.call.options(num_returns=num_returns).remote(method, *args, **kwargs)


def kill(actor: Any) -> None:
    """End a worker's process at once."""
    ray.kill(actor)


@dataclass(frozen=True)
class ActorGroup:
    """The workers of one role that stand and fall together: the ranks of a collective."""

    role: str
    actors: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.actors)

    def submit(self, index: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call one worker without waiting; returns a reference."""
        return submit(self.actors[index], method, *args, **kwargs)

    def submit_all(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call every worker without waiting; references by worker name."""
        return {self.name(i): self.submit(i, method, *args, **kwargs) for i in range(len(self))}

    def call_all(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """Call every worker and wait for all of them."""
        return gather(self.submit_all(method, *args, **kwargs), phase=method, timeout_s=timeout_s)

    def hold(self, lists: Sequence[Sequence[list[Any]]], *, timeout_s: float) -> list[list[int]]:
        """Have each worker fetch its lists of references; the places that each of them found lost."""
        calls = {
            self.name(i): actor.hold.remote(*own) for i, (actor, own) in enumerate(zip(self.actors, lists, strict=True))
        }
        return gather(calls, phase="fetching data", timeout_s=timeout_s)

    def identities(self) -> dict[str, Any]:
        """References to where each process is, by worker name."""
        return {self.name(i): actor.identity.remote() for i, actor in enumerate(self.actors)}

    def name(self, index: int) -> str:
        return f"{self.role} {index}"

    def kill(self) -> None:
        """End the workers' processes at once."""
        for actor in self.actors:
            kill(actor)


def gather(
    references: Mapping[str, Any],
    *,
    phase: str,
    timeout_s: float,
    should_stop: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The values of `references` (by worker name), in order. `meanwhile` is called again and again in the wait.

    Raises:
        WorkersLostError: a worker died, or did not answer within the deadline; it is named.
        WorkerError: a worker raised.
        ValueError: a worker raised one: the user's mistake.
        StopRequestedError: `should_stop` became true while waiting.
    """
    outcomes: dict[str, Outcome] = {}
    pending = dict(references)
    deadline = time.monotonic() + timeout_s
    while pending:
        if should_stop():
            raise StopRequestedError(phase)
        meanwhile()
        finished = take_finished(pending)
        outcomes |= finished
        if any(outcome.trouble for outcome in finished.values()):
            outcomes |= settle(pending, timeout_s=GRACE_S)
            break
        if pending and time.monotonic() > deadline:
            names = sorted(pending)
            raise WorkersLostError(f"{phase}: no answer from {', '.join(names)} within {timeout_s:g} s", names)
    raise_trouble(outcomes, phase)
    return [outcomes[name].value for name in references]


def settle(references: Mapping[Any, Any], *, timeout_s: float) -> dict[Any, Outcome]:
    """What became of each call by the deadline; calls that are still open are left out."""
    outcomes: dict[Any, Outcome] = {}
    pending = dict(references)
    deadline = time.monotonic() + timeout_s
    while pending and time.monotonic() < deadline:
        outcomes |= take_finished(pending)
    return outcomes


def take_finished(pending: dict[Any, Any], *, wait_s: float = POLL_S, all_together: bool = True) -> dict[Any, Outcome]:
    """Take the calls out of `pending` that have ended, after waiting for all, or for the first, for up to `wait_s`."""
    if not pending:
        return {}
    count = len(pending) if all_together else 1
    done, _ = ray.wait(list(pending.values()), num_returns=count, timeout=wait_s, fetch_local=False)
    if done and not all_together:  # those that ended together with the first
        done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=0, fetch_local=False)
    finished = set(done)
    names = [name for name, reference in pending.items() if reference in finished]
    return {name: outcome_of(pending.pop(name)) for name in names}


def outcome_of(reference: Any) -> Outcome:
    """The value of a call that has ended, or what went wrong."""
    try:
        return Outcome(ray.get(reference, timeout=FETCH_TIMEOUT_S))
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):
            return Outcome(trouble=Trouble.MISTAKE, reason=str(cause))
        if isinstance(cause, BrokenWorkerError):
            return Outcome(trouble=Trouble.DIED, reason=str(cause))
        if isinstance(cause, (ResponsesLostError, *LOST_VALUES)):
            return Outcome(trouble=Trouble.LOST_DATA, reason=str(cause))
        return Outcome(trouble=Trouble.FAILED, reason=f"{type(cause).__name__}: {cause}\n{error}")
    except DEATHS as error:
        return Outcome(trouble=Trouble.DIED, reason=str(error))
    except RayError as error:
        return Outcome(trouble=Trouble.LOST_DATA, reason=f"{type(error).__name__}: {error}")


def raise_trouble(outcomes: Mapping[str, Outcome], phase: str) -> None:
    """Raise for what went wrong, if anything did: whose process ended comes before who only lost contact with it."""
    lost = {name: outcome for name, outcome in outcomes.items() if outcome.trouble in LOSSES}
    if lost:
        reasons = "; ".join(
            f"{name} died in {phase}: {outcome.reason}"
            if outcome.trouble is Trouble.DIED
            else f"the answer of {name} in {phase} is lost, as with its node: {outcome.reason}"
            for name, outcome in lost.items()
        )
        raise WorkersLostError(reasons, list(lost))
    for name, outcome in outcomes.items():
        if outcome.trouble is Trouble.MISTAKE:
            raise ValueError(f"{name}, {phase}: {outcome.reason}")
        if outcome.trouble is not None:
            raise WorkerError(f"{name} failed in {phase}: {outcome.reason}")


def value_of(reference: Any) -> Any:
    """Fetch one value to the driver (samples for people to read; not tokens or tensors)."""
    return ray.get(reference, timeout=FETCH_TIMEOUT_S)
