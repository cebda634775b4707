"""Starting or joining Ray, and comparing what the run asks for with what the cluster has."""

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray._private.state as ray_state
import ray._private.utils as ray_utils
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue] (compiled)

from raylhf.cluster.actors import StopRequestedError, WorkerError, gather
from raylhf.cluster.private import private_folder
from raylhf.config.cluster import PRIVATE_FOLDER_VARIABLE, ClusterConfig
from raylhf.config.placement import EPSILON, Role

START_ATTEMPTS = 3
NODE_POLL_S = 0.5
EXPECTED_NODES_VARIABLE = "RAYLHF_EXPECTED_NODES"
_TIMED_OUT = "timed out during startup"
_BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")


@contextmanager
def ray_session(config: ClusterConfig, *, env: Mapping[str, str], prometheus_port: int | None = None) -> Iterator[None]:
    """Join the cluster at `config.address`, or start Ray on this machine alone and stop it at the end.

    A Ray that raylhf starts has no dashboard and asks every caller for a token made for this run alone; its own ports
    are open to the network, as Ray has no setting for that. At `prometheus_port` (None: any free one) it answers
    whoever asks for metrics, as Prometheus does; a cluster that is joined has ports of its own.

    Raises:
        ValueError: something else listens at `prometheus_port`.
        WorkerError: Ray does not start, or does not answer at `config.address`.
    """
    variables = dict(env)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    with private_folder() as private:
        if config.address is None:
            if prometheus_port is not None:
                _require_free(prometheus_port)
            variables[PRIVATE_FOLDER_VARIABLE] = str(private)
            use_private_token(private)
            _init_ray(
                address="local",  # without it, Ray joins one that somebody else has started on this machine
                num_cpus=config.cpus_per_node,
                num_gpus=config.gpus_per_node,
                object_store_memory=int(config.object_store_gib * 2**30),
                include_dashboard=False,
                _metrics_export_port=prometheus_port,  # Ray has no public name for it in `ray.init`
                **common,
            )
        else:
            _init_ray(address=config.address, **common)
        try:
            yield
        finally:
            ray.shutdown()


def _require_free(port: int) -> None:
    """ValueError where the port is taken: Ray would not say so, but fail to start."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"tracking.prometheus_port: {port} cannot be listened at ({error.strerror}); another run may have it: "
                "choose another one, or leave it null"
            ) from error


def _init_ray(**settings: Any) -> None:
    """`ray.init` under the signal handlers that are there.

    Ray gives a starting node 30 s, which a busy machine can exceed; it is tried again before the run gives up.
    """
    # Of a worker that is lost, one call that failed says enough; Ray would print all of them.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _own_sigterm_handler():
                ray.init(**settings)
            return
        except ConnectionError as error:
            raise WorkerError(f"cluster.address {settings.get('address')!r}: no Ray answers there ({error})") from error
        except Exception as error:  # Ray raises nothing narrower
            ray.shutdown()
            if _TIMED_OUT not in str(error):
                raise
            if attempt == START_ATTEMPTS:
                raise WorkerError(f"Ray did not start in {attempt} attempts: {error}") from error


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep Ray from putting its SIGTERM handlers in the place of ours, for which it has no setting.

    The one in Python raises SystemExit wherever the program is at that moment. In code whose exceptions the interpreter
    drops (a finaliser, a hook around a fork) the signal is lost with it, and the run goes on as if nobody had asked it
    to stop. The one in C++ aborts; it comes with the connection, at the end of `ray.init`, and ours is then set anew.
    """
    handler = signal.getsignal(signal.SIGTERM)
    install = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = install
        signal.signal(signal.SIGTERM, handler)


def use_private_token(folder: Path) -> dict[str, str]:
    """A token for the Ray that this process starts next, in a file that only this user reads.

    Ray would otherwise share one per home. A RAY_AUTH_MODE that the shell has set for other clusters does not count,
    nor RAY_AUTH_TOKEN, which Ray prefers to the file. Returns the variables that a process which joins needs.
    """
    token = folder / "ray-token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ.update(variables)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    Config.initialize("")  # Ray read the mode at its import
    AuthenticationTokenLoader.instance().reset_cache()  # of an earlier Ray of this process
    return variables


def await_nodes(config: ClusterConfig, *, should_stop: Callable[[], bool]) -> None:
    """Wait until a cluster that is joined has `config.num_nodes` nodes.

    Raises:
        WorkerError: it has fewer after `start_timeout_s`; the sentence names those that are missing, where a launcher
            said in RAYLHF_EXPECTED_NODES which there are to be.
        StopRequestedError: `should_stop` became true meanwhile.
    """
    deadline = time.monotonic() + config.start_timeout_s
    while config.address is not None and len(_alive_nodes()) < config.num_nodes:
        if should_stop():
            raise StopRequestedError("waiting for the nodes")
        if time.monotonic() > deadline:
            there = _alive_hosts()
            missing = missing_nodes()
            names = f"; missing: {', '.join(missing)}" if missing else ""
            raise WorkerError(
                f"{len(there)} of cluster.num_nodes={config.num_nodes} nodes are in the Ray cluster {config.address} "
                f"({', '.join(there)}){names}. Waited for cluster.start_timeout_s={config.start_timeout_s:g} s. Look "
                "at the output of `ray start` on those that are missing, or lower cluster.num_nodes."
            )
        time.sleep(NODE_POLL_S)


def missing_nodes() -> list[str]:
    """Hosts that a launcher named in RAYLHF_EXPECTED_NODES and that are not in the cluster."""
    there = {host.split(".")[0] for host in _alive_hosts()}  # a scheduler's names are short, a host's may be whole
    return [name for name in os.environ.get(EXPECTED_NODES_VARIABLE, "").split() if name.split(".")[0] not in there]


def _alive_hosts() -> list[str]:
    return [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]]


def preflight(roles: Sequence[Role]) -> None:
    """Compare what the run cannot start without with the nodes that are there, before anything starts.

    Raises:
        ValueError: a role cannot be placed; the sentence names it and what each node has.
    """
    nodes = _alive_nodes()
    described = describe_nodes()
    for role in roles:
        _require_nodes(role, [_num_workers_on(node, role) for node in nodes], described)
    for resource in dict.fromkeys(name for role in roles for name in role.bundle):
        parts = [(role, role.bundle[resource]) for role in roles if resource in role.bundle]
        wanted = sum(role.num_staying * amount for role, amount in parts)
        there = sum(n.get(resource, 0) for n in nodes)
        if wanted > there + EPSILON:
            terms = ", ".join(f"{role.name} {role.num_staying} x {amount:g}" for role, amount in parts)
            raise ValueError(
                f"the run needs {wanted:g} {resource} ({terms}) but the cluster has {there:g} ({described}). Use fewer "
                "replicas or ranks, or a larger cluster."
            )


def _require_nodes(role: Role, counts: Sequence[int], described: str) -> None:
    """ValueError unless nodes that could hold `counts` workers of the role suffice for it and its placement."""
    count, most, which = role.num_staying, max(counts, default=0), f"placement {role.placement} of {role.name}"
    less = f"num_cpus, num_gpus or resources of {role.name}"
    if most == 0:
        raise ValueError(
            f"no node can hold {role.describe()}; the nodes have: {described}. Lower {less}, or add a node that has "
            "them."
        )
    if role.placement == "STRICT_PACK" and most < count:
        raise ValueError(
            f"{which} asks for one node that holds {count} x {role.describe()}, but none holds more than {most}; the "
            f"nodes have: {described}. Use PACK, lower {less}, or add a larger node."
        )
    if role.placement == "STRICT_SPREAD" and (num_fitting := sum(map(bool, counts))) < count:
        raise ValueError(
            f"{which} asks for {count} nodes with {role.describe()} on each, but only {num_fitting} can hold one; the "
            f"nodes have: {described}. Use SPREAD, fewer workers, or add nodes."
        )


def _num_workers_on(node: Mapping[str, float], role: Role) -> int:
    """How many workers of the role an empty node can hold; all of them where they reserve nothing."""
    counts = []
    for name, wanted in role.bundle.items():
        there = node.get(name, 0.0)
        if name == "GPU" and wanted < 1:  # a share lies on one GPU
            counts.append(int(there) * int(1 / wanted + EPSILON))
        else:
            counts.append(int(there / wanted + EPSILON))
    return min(counts, default=role.replicas)


def _alive_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe_nodes() -> str:
    """What each node has: CPUs, GPUs and custom resources."""

    def describe(node: dict[str, float]) -> str:
        custom = {name: amount for name, amount in node.items() if name not in _BUILT_IN and ":" not in name}
        amounts = {"CPU": node.get("CPU", 0), "GPU": node.get("GPU", 0), **custom}
        return " / ".join(f"{amount:g} {name}" for name, amount in amounts.items())

    return ", ".join(describe(node) for node in _alive_nodes())


def object_store_use() -> dict[str, float]:
    """The share of each living node's object store that is taken by values which are still referred to, by address."""
    free = ray_state.available_resources_per_node()  # Ray has a public function only for the sum over all nodes
    use = {}
    for node in ray.nodes():
        name, size = node["NodeManagerAddress"], node["Resources"].get("object_store_memory", 0.0)
        if node["Alive"] and size and node["NodeID"] in free:
            use[name] = 1 - free[node["NodeID"]].get("object_store_memory", 0.0) / size
    return use


def run_on_cluster(function: Callable[..., Any], *args: Any, timeout_s: float, should_stop: Callable[[], bool]) -> Any:
    """Call `function` once in a process of its own, so that what it imports and loads is gone afterwards."""
    reference = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(function).remote(*args)
    name = function.__name__
    return gather({name: reference}, phase="start-up", timeout_s=timeout_s, should_stop=should_stop)[0]
