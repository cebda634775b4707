"""Asks every node of the cluster something: one call on each, by node affinity, with a deadline for each."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylhf.cluster.actors import POLL_S, Launcher, Outcome, kill, settle, submit, take_finished
from raylhf.cluster.session import NODE_POLL_S

WARM_UP_BYTES = 2**20
OPEN_SHARE = 0.7
"""Of a deadline: who has not answered by then is at fault alone, and the others still have time to go on."""


@dataclass(frozen=True)
class RayNode:
    """A living node."""

    name: str
    """Host name, with the address where several nodes share it."""
    node_id: str
    address: str
    resources: Mapping[str, float] = field(default_factory=dict)
    """What it offers to Ray; bytes for its memories."""


@dataclass(frozen=True)
class Answer:
    """What one node answered, and when by the caller's clock (`time.time`)."""

    value: Any
    problem: str
    """Why there is no value, or an empty string."""
    sent_at: float
    received_at: float


def joined_nodes(num_nodes: int, *, timeout_s: float) -> list[RayNode]:
    """The living nodes, as soon as there are `num_nodes`; at the deadline those that there are."""
    deadline = time.monotonic() + timeout_s
    while len(alive := [node for node in ray.nodes() if node["Alive"]]) < num_nodes and time.monotonic() < deadline:
        time.sleep(NODE_POLL_S)
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    nodes = []
    for node in alive:
        host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        name = host if hosts[host] == 1 else f"{host} ({address})"
        nodes.append(RayNode(name, node["NodeID"], address, node["Resources"]))
    return sorted(nodes, key=lambda node: node.name)


def ask_nodes(
    function: Callable[..., Any],
    nodes: Sequence[RayNode],
    *,
    timeout_s: float,
    arguments_of: Callable[[RayNode], tuple[Any, ...]] = lambda node: (),
) -> dict[str, Answer]:
    """Call `function` once in a process on each of the nodes, all at a time; answers by the node's name.

    What does not answer by the deadline is an answer with a problem, and its process is ended.
    """
    sent_at, deadline = time.time(), time.monotonic() + timeout_s
    references = {node.name: _on(node, function).remote(*arguments_of(node)) for node in nodes}
    answers: dict[str, Answer] = {}
    pending = dict(references)
    while pending and (left := deadline - time.monotonic()) > 0:
        finished = take_finished(pending, wait_s=min(POLL_S, left), all_together=False)
        received_at = time.time()
        answers |= {name: Answer(o.value, _problem(o), sent_at, received_at) for name, o in finished.items()}
    for name, reference in pending.items():
        ray.cancel(reference, force=True)
        answers[name] = Answer(None, f"no answer within {timeout_s:.0f} s", sent_at, time.time())
    return {node.name: answers[node.name] for node in nodes}


def transfer_rates(nodes: Sequence[RayNode], *, num_bytes: int, timeout_s: float) -> dict[str, Answer]:
    """GB/s at which each node fetches a value of `num_bytes` from the one before it, through Ray's object stores.

    All fetch at a time, as in a step. Answers by the name of the node that fetches; the first fetches from the last.
    """
    deadline = time.monotonic() + timeout_s
    payloads = {
        node.name: [_on(node, _payload).remote(count) for count in (WARM_UP_BYTES, num_bytes)] for node in nodes
    }
    everything = [reference for pair in payloads.values() for reference in pair]
    ray.wait(everything, num_returns=len(everything), timeout=timeout_s, fetch_local=False)
    sources = {node.name: nodes[number - 1].name for number, node in enumerate(nodes)}
    left = max(deadline - time.monotonic(), POLL_S)
    answers = ask_nodes(
        _fetch_rate, nodes, timeout_s=left, arguments_of=lambda node: (payloads[sources[node.name]], left)
    )
    return {
        name: replace(answer, problem=f"fetching from {sources[name]}: {answer.problem}") if answer.problem else answer
        for name, answer in answers.items()
    }


def _payload(num_bytes: int) -> bytes:
    return bytes(num_bytes)


def _fetch_rate(references: list[Any], timeout_s: float) -> float:
    warm_up, payload = references
    ray.get(warm_up, timeout=timeout_s)  # connects
    started = time.perf_counter()
    value = ray.get(payload, timeout=timeout_s)
    return len(value) / 1e9 / (time.perf_counter() - started)


def meet(build: Callable[[], Any], nodes: Sequence[RayNode], *, num_gpus: float, timeout_s: float) -> dict[str, Answer]:
    """Have a process on each node take part in a collective; its worker is what `build` makes there.

    `open()` is called on each and returns the port at which that one could be met; then `reduce(host, port, rank,
    world_size, timeout_s)` on those that opened, which meet at the first of them. The processes are ended.
    """
    sent_at, deadline = time.time(), time.monotonic() + timeout_s
    options = {number: _affinity(node) for number, node in enumerate(nodes)}
    launcher = Launcher("probe", build, num_cpus=0, num_gpus=num_gpus, env={}, options_of=options.__getitem__)
    actors = {node.name: launcher.launch(number) for number, node in enumerate(nodes)}
    try:
        opening = {name: submit(actor, "open") for name, actor in actors.items()}
        outcomes = settle(opening, timeout_s=OPEN_SHARE * timeout_s)
        opened = [node for node in nodes if node.name in outcomes and outcomes[node.name].trouble is None]
        left = max(deadline - time.monotonic(), POLL_S)
        calls = {}
        for rank, node in enumerate(opened):
            meeting = (opened[0].address, outcomes[opened[0].name].value, rank, len(opened), OPEN_SHARE * left)
            calls[node.name] = submit(actors[node.name], "reduce", *meeting)
        reduced = settle(calls, timeout_s=left)
    finally:
        for actor in actors.values():
            kill(actor)
    late = Outcome(trouble=None, reason=f"no answer within {timeout_s:.0f} s")
    outcomes = {name: outcome for name, outcome in outcomes.items() if name not in calls} | reduced
    answers = {node.name: outcomes.get(node.name, late) for node in nodes}
    return {name: Answer(o.value, _problem(o), sent_at, time.time()) for name, o in answers.items()}


def _on(node: RayNode, function: Callable[..., Any]) -> Any:
    """The function as a task of one node."""
    return ray.remote(num_cpus=0, max_retries=0, **_affinity(node))(function)


def _affinity(node: RayNode) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}


def _problem(outcome: Outcome) -> str:
    """The first line of what went wrong; the stack behind it helps nobody who mends a node."""
    return outcome.reason.strip().split("\n")[0] or (outcome.trouble.value if outcome.trouble else "")
