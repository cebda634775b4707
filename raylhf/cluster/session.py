"""Starting or joining Ray, and comparing what the run asks for with what the cluster has."""

import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from raylhf.cluster.actors import StopRequestedError, WorkerError, gather
from raylhf.config.cluster import ClusterConfig
from raylhf.config.placement import Role

START_ATTEMPTS = 3
_TIMED_OUT = "timed out during startup"


@contextmanager
def ray_session(config: ClusterConfig, *, env: Mapping[str, str]) -> Iterator[None]:
    """Join the cluster at `config.address`, or start Ray on this machine alone and stop it at the end.

    A Ray that raylhf starts has no dashboard and asks every caller for a token made for this run alone; its own ports
    are open to the network, as Ray has no setting for that.
    """
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": dict(env)}}
    with tempfile.TemporaryDirectory(prefix="raylhf-") as private:
        if config.address is None:
            _use_private_token(Path(private))
            _init_ray(
                num_cpus=config.cpus_per_node,
                num_gpus=config.gpus_per_node,
                object_store_memory=int(config.object_store_gib * 2**30),
                include_dashboard=False,
                **common,
            )
        else:
            _init_ray(address=config.address, **common)
        try:
            yield
        finally:
            ray.shutdown()


def _init_ray(**settings: Any) -> None:
    """`ray.init`, which puts a SIGTERM handler of its own in the place of ours and leaves it there.

    Ray gives a starting node 30 s, which a busy machine can exceed; it is tried again before the run gives up.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                ray.init(**settings)
                return
            except ConnectionError as error:
                raise WorkerError(
                    f"cluster.address {settings.get('address')!r}: no Ray answers there ({error})"
                ) from error
            except Exception as error:  # Ray raises nothing narrower
                ray.shutdown()
                if _TIMED_OUT not in str(error):
                    raise
                if attempt == START_ATTEMPTS:
                    raise WorkerError(f"Ray did not start in {attempt} attempts: {error}") from error
    except SystemExit:  # Ray's handler was called
        ray.shutdown()
        raise StopRequestedError("starting Ray") from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _use_private_token(folder: Path) -> None:
    """A token for this Ray alone, in a file that only this user reads (Ray would otherwise share one per home).

    RAY_AUTH_MODE stays as it is: unset, `ray.init` turns tokens on; Ray has read a value set by the user at its import.
    """
    token = folder / "ray-token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def preflight(roles: Sequence[Role]) -> None:
    """Compare the request with the nodes that are there, before anything starts.

    Raises:
        ValueError: a role cannot be placed; the sentence names it and what each node has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    described = ", ".join(f"{n.get('CPU', 0):g} CPU / {n.get('GPU', 0):g} GPU" for n in nodes)
    for role in roles:
        if not any(n.get("CPU", 0) >= role.num_cpus and n.get("GPU", 0) >= role.num_gpus for n in nodes):
            raise ValueError(
                f"no node can hold one {role.name} ({role.num_cpus:g} CPU, {role.num_gpus:g} GPU); the "
                f"cluster's nodes have: {described}. Lower {role.name}.num_cpus or num_gpus, or add a larger node."
            )
    for resource, unit in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        wanted = sum(r.replicas * getattr(r, unit) for r in roles)
        there = sum(n.get(resource, 0) for n in nodes)
        if wanted > there + 1e-6:
            parts = ", ".join(f"{r.name} {r.replicas} x {getattr(r, unit):g}" for r in roles)
            raise ValueError(
                f"the run needs {wanted:g} {resource} ({parts}) but the cluster has {there:g} ({described}). Use fewer "
                "replicas or ranks, or a larger cluster."
            )


def run_on_cluster(function: Callable[..., Any], *args: Any, timeout_s: float, should_stop: Callable[[], bool]) -> Any:
    """Call `function` once in a process of its own, so that what it imports and loads is gone afterwards."""
    reference = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(function).remote(*args)
    name = function.__name__
    return gather({name: reference}, phase="start-up", timeout_s=timeout_s, should_stop=should_stop)[0]
