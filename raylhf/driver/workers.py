"""The three roles of a run: starting them, connecting learners with rollout workers, ending them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from raylhf.cluster.actors import ActorGroup, WorkerError, gather, start_group
from raylhf.cluster.session import preflight
from raylhf.config import RunConfig
from raylhf.config.placement import roles_of
from raylhf.config.run import AnyRunConfig, OfflineRunConfig, RewardModelRunConfig
from raylhf.driver.roles import (
    learner_worker,
    preference_learner_worker,
    reward_learner_worker,
    reward_worker,
    rollout_worker,
    weight_sender,
)

CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Workers:
    """The groups of a run."""

    rollout: ActorGroup
    reward: ActorGroup
    learner: ActorGroup


@contextmanager
def running_workers(
    config: RunConfig, folder: str, second_folder: str, *, should_stop: Callable[[], bool]
) -> Iterator[Workers]:
    """Start all workers, hand them out when all are ready and connected, and end them and their children after."""
    preflight(roles_of(config))
    workers = _create(config, folder, second_folder)
    children: list[psutil.Process] = []
    try:
        # Rewards first in line: a reward that cannot be built is told before the engines are up.
        starts = workers.reward.submit_all("start") | workers.rollout.submit_all("start")
        starts |= _start_learners(config, workers.learner, should_stop)
        gather(starts, phase="start-up", timeout_s=config.cluster.start_timeout_s, should_stop=should_stop)
        children = _children(config, workers)
        _connect(config, workers)
        yield workers
    finally:
        _end(workers, children)


@contextmanager
def running_offline_learners(
    config: OfflineRunConfig, folders: Sequence[str], *, should_stop: Callable[[], bool]
) -> Iterator[ActorGroup]:
    """Start the ranks that train on stored judgements, hand them out when all are ready, and end them after."""
    preflight(roles_of(config))
    if isinstance(config, RewardModelRunConfig):
        learners = _create_learners(config, reward_learner_worker, folders[0])
    else:
        learners = _create_learners(config, preference_learner_worker, folders[0], folders[-1])
    try:
        starts = _start_learners(config, learners, should_stop)
        gather(starts, phase="start-up", timeout_s=config.cluster.start_timeout_s, should_stop=should_stop)
        yield learners
    finally:
        try:
            with suppress(WorkerError, ValueError):  # the failure that led here is the one to report
                learners.call_all("close", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            learners.kill()


def _create(config: RunConfig, folder: str, second_folder: str) -> Workers:
    rollout = config.rollout
    return Workers(
        rollout=start_group(
            "rollout",
            rollout_worker,
            [((config, folder), {"replica": i}) for i in range(rollout.replicas)],
            num_cpus=rollout.num_cpus,
            num_gpus=rollout.num_gpus,
            env={"OMP_NUM_THREADS": str(rollout.threads)},
            is_async=True,
        ),
        reward=start_group(
            "reward",
            reward_worker,
            [((config.reward, folder), {}) for _ in range(config.reward.replicas)],
            num_cpus=config.reward.num_cpus,
            num_gpus=config.reward.num_gpus,
            env={"OMP_NUM_THREADS": str(config.reward.threads)},
            is_async=True,
        ),
        learner=_create_learners(config, learner_worker, folder, second_folder),
    )


def _create_learners(config: AnyRunConfig, build: Callable[..., Any], *args: Any) -> ActorGroup:
    """The ranks: `build(config, *args, rank=...)` each."""
    learner = config.learner
    env = {"OMP_NUM_THREADS": str(learner.threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if learner.num_gpus == 0:
        env["DS_ACCELERATOR"] = "cpu"
    return start_group(
        "learner",
        build,
        [((config, *args), {"rank": rank}) for rank in range(learner.num_ranks)],
        num_cpus=learner.num_cpus,
        num_gpus=learner.num_gpus,
        env=env,
    )


def _start_learners(config: AnyRunConfig, learners: ActorGroup, should_stop: Callable[[], bool]) -> dict[str, Any]:
    address = {
        f"{learners.name(0)} (host)": learners.node_ip(0),
        learners.name(0): learners.submit(0, "open_rendezvous"),
    }
    timeout_s = config.cluster.start_timeout_s
    host, port = gather(address, phase="rendezvous", timeout_s=timeout_s, should_stop=should_stop)
    return learners.submit_all("start", host, port)


def _connect(config: RunConfig, workers: Workers) -> None:
    """Open the weight transfer between rank 0 of the learners and every rollout worker."""
    timeout_s = config.cluster.start_timeout_s
    tensor_parallel = config.rollout.tensor_parallel_size
    host = gather({workers.learner.name(0): workers.learner.node_ip(0)}, phase="node_ip", timeout_s=timeout_s)[0]
    make_sender = partial(
        weight_sender,
        config.weight_transfer,
        world_size_of_rollout=config.rollout.replicas * tensor_parallel,
        host=host,
        timeout_s=timeout_s,
    )
    init_info = workers.learner.call_all("prepare_sender", make_sender, timeout_s=timeout_s)[0]
    joins = {
        workers.rollout.name(i): workers.rollout.submit(i, "join_transfer", init_info)
        for i in range(len(workers.rollout))
    }
    gather(
        joins | workers.learner.submit_all("connect_sender"), phase="connecting weight transfer", timeout_s=timeout_s
    )


def _children(config: RunConfig, workers: Workers) -> list[psutil.Process]:
    """Child processes of rollout workers on this machine (none are looked up on another node)."""
    if config.cluster.address is not None:
        return []
    pids = [pid for pids in workers.rollout.call_all("child_pids", timeout_s=CLOSE_TIMEOUT_S) for pid in pids]
    return [psutil.Process(pid) for pid in pids]


def _end(workers: Workers, children: list[psutil.Process]) -> None:
    """Ask workers to close, within a deadline, then end what is left, whatever happens meanwhile."""
    try:
        # A worker that does not close is ended below; the failure that led here is the one to report.
        with suppress(WorkerError, ValueError):
            gather(
                workers.rollout.submit_all("close") | workers.learner.submit_all("close"),
                phase="closing",
                timeout_s=CLOSE_TIMEOUT_S,
            )
    finally:
        for group in (workers.rollout, workers.reward, workers.learner):
            group.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):  # it ended, or its number belongs to another process now
                child.kill()
