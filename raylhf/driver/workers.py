"""The three roles of a run: starting them, keeping them going, ending them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raylhf.cluster.actors import START, ActorGroup, Identity, Launcher, WorkerError, gather
from raylhf.cluster.placement import RolePlacement, reserve
from raylhf.cluster.pool import Loss, WorkerPool
from raylhf.cluster.session import preflight
from raylhf.config import RunConfig
from raylhf.config.placement import COLOCATED, reserved_roles, roles_of
from raylhf.config.run import AnyRunConfig, OfflineRunConfig, RewardModelRunConfig
from raylhf.driver.crash import LOG_FOLDER
from raylhf.driver.roles import (
    learner_worker,
    preference_learner_worker,
    reward_learner_worker,
    reward_worker,
    rollout_worker,
)
from raylhf.driver.scaling import RolloutScaling
from raylhf.driver.statistics import RewardStatistics
from raylhf.driver.weight_sync import WeightSync

LOGGER = logging.getLogger(__name__)
CLOSE_TIMEOUT_S = 30.0


class Workers:
    """The workers of a run. Rollout and reward workers are replaced one by one, learners all together."""

    def __init__(
        self,
        config: RunConfig,
        model_folder: str,
        second_folder: str,
        *,
        folder: Path,
        should_stop: Callable[[], bool],
        on_loss: Callable[[Loss], None],
    ) -> None:
        """Launch all of them. `second_folder` is that of the critic's or guide's model, `folder` the run's.

        Raises:
            ValueError: the nodes cannot hold them.
            WorkerError: what they need is not free within the deadline.
        """
        self.config = config
        self._folders = (model_folder, second_folder)
        self._logs = folder / LOG_FOLDER
        self._should_stop = should_stop
        self.scaling = RolloutScaling(config, folder)
        roles = reserved_roles(config, num_rollout=self.scaling.start_size)
        preflight(roles)
        cluster = config.cluster
        self._places = reserve(roles, timeout_s=cluster.start_timeout_s, should_stop=should_stop)
        if COLOCATED in self._places:
            self._places |= dict.fromkeys(("rollout", "learner"), self._places.pop(COLOCATED))
        limits = {
            "silence_s": cluster.worker_timeout_s,
            "start_timeout_s": cluster.start_timeout_s,
            "max_losses": cluster.max_restarts,
            "on_loss": on_loss,
        }
        # Rewards first in line: a reward that cannot be built is told before the engines are up.
        self.reward = WorkerPool(
            self._launcher("reward", reward_worker, config.reward),
            lambda number: ((config.reward, model_folder), {}),
            size=config.reward.replicas,
            **limits,
        )
        self.rollout = WorkerPool(
            self._launcher("rollout", rollout_worker, config.rollout),
            lambda number: ((config, model_folder), {"replica": number}),
            size=min(self.scaling.start_size, self._places["rollout"].num_ready()),
            join=self._places["rollout"].take,
            leave=self._places["rollout"].give_back,
            **limits,
        )
        self.learner = self._launch_learners()
        self.num_learner_restarts = 0
        """How often all ranks were started anew."""
        self.start_seconds: dict[str, float] = {}
        """Metrics of the workers' own starts."""
        self.statistics = RewardStatistics(config, self.reward, should_stop)
        self.sync = WeightSync(config, self.rollout, self.learner)

    def start(self) -> None:
        """Wait until all of them are up."""
        rewards, rollouts = self.reward.start_references(), self.rollout.start_references()
        starts = rewards | rollouts | _start_learners(self.config, self.learner, self._should_stop)
        timeout_s = self.config.cluster.start_timeout_s
        answers = gather(starts, phase="start-up", timeout_s=timeout_s, should_stop=self._should_stop)
        of_engines = answers[len(rewards) : len(rewards) + len(rollouts)]
        self.start_seconds = {
            "time/start_engine_s": max(answer["start_s"] for answer in of_engines),
            "time/start_learner_s": max(answers[len(rewards) + len(rollouts) :]),
        }
        self.rollout.poll()
        self.reward.poll()
        self.statistics.begin()

    def publish(self, version: int) -> dict[str, float]:
        """Send the learners' weights to every rollout worker that is up (see `WeightSync.send`)."""
        return self.sync.send(version, should_stop=self._should_stop)

    def tend(self, *, may_publish: bool = True) -> bool:
        """Look after rollout and reward workers, without waiting unless nobody else can go on.

        With `may_publish`, weights are sent where no rollout worker has the present ones; the learners must be idle.
        Returns whether a reward worker was lost since the last time.

        Raises:
            WorkerError: a worker is lost again and again.
        """
        self.rollout.poll()
        has_lost_rewards = bool(self.reward.poll())
        self.statistics.bring_back()
        if may_publish and not self.rollout.serving() and self.rollout.up():
            self.publish(self.sync.version)
        return has_lost_rewards

    def follow_scaling(self) -> None:
        """Let rollout workers join or leave, as asked for; to be called between two steps.

        Those that join start beside the others, and serve after the next weight sync that finds them up.
        """
        self.scaling.follow(self.rollout)

    def progressed(self) -> None:
        """A step is finished: earlier losses are forgiven."""
        self.rollout.progressed()
        self.reward.progressed()

    def restart_learners(self) -> None:
        """End all ranks and start new ones, which hold the model folder's weights until they load a checkpoint."""
        self.learner.kill()
        self.num_learner_restarts += 1
        self.learner = self._launch_learners()
        self.sync = WeightSync(self.config, self.rollout, self.learner)
        starts = _start_learners(self.config, self.learner, self._should_stop)
        timeout_s = self.config.cluster.start_timeout_s
        gather(starts, phase="restart of the learners", timeout_s=timeout_s, should_stop=self._should_stop)

    def end(self) -> None:
        """Ask workers to close, within a deadline, then end what is left, whatever happens meanwhile."""
        try:
            # A worker that does not close is ended below; the failure that led here is the one to report.
            with suppress(WorkerError, ValueError):
                closing = self.rollout.submit_to(self.rollout.up(), "close") | self.learner.submit_all("close")
                gather(closing, phase="closing", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self.rollout.kill()
            self.reward.kill()
            self.learner.kill()
            for place in self._places.values():
                place.remove()

    def _launcher(self, role: str, build: Callable[..., Any], settings: Any) -> Launcher:
        return Launcher(
            role,
            build,
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            env={"OMP_NUM_THREADS": str(settings.threads)},
            log_folder=self._logs,
            is_async=True,
            resources=settings.resources,
            options_of=self._places[role].options,
        )

    def _launch_learners(self) -> ActorGroup:
        place = self._places["learner"]
        return _launch_learners(self.config, learner_worker, *self._folders, logs=self._logs, place=place)


@contextmanager
def running_workers(
    config: RunConfig,
    model_folder: str,
    second_folder: str,
    *,
    folder: Path,
    should_stop: Callable[[], bool],
    on_loss: Callable[[Loss], None],
) -> Iterator[Workers]:
    """Start all workers, hand them out when all are ready, and end them and their children after."""
    workers = Workers(config, model_folder, second_folder, folder=folder, should_stop=should_stop, on_loss=on_loss)
    try:
        workers.start()
        yield workers
    finally:
        workers.end()


@contextmanager
def running_offline_learners(
    config: OfflineRunConfig, model_folders: Sequence[str], *, folder: Path, should_stop: Callable[[], bool]
) -> Iterator[ActorGroup]:
    """Start the ranks that train on stored judgements, hand them out when all are ready, and end them after."""
    preflight(roles_of(config))
    places = reserve(roles_of(config), timeout_s=config.cluster.start_timeout_s, should_stop=should_stop)
    place = places["learner"]
    is_reward_model = isinstance(config, RewardModelRunConfig)
    build = reward_learner_worker if is_reward_model else preference_learner_worker
    models = model_folders[:1] if is_reward_model else (model_folders[0], model_folders[-1])
    learners = _launch_learners(config, build, *models, logs=folder / LOG_FOLDER, place=place)
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
            place.remove()


def _launch_learners(
    config: AnyRunConfig, build: Callable[..., Any], *args: Any, logs: Path, place: RolePlacement
) -> ActorGroup:
    """The ranks: `build(config, *args, rank=...)` each."""
    learner = config.learner
    env = {"OMP_NUM_THREADS": str(learner.threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if learner.num_gpus == 0:
        env["DS_ACCELERATOR"] = "cpu"
    launcher = Launcher(
        "learner",
        build,
        num_cpus=learner.num_cpus,
        num_gpus=learner.num_gpus,
        env=env,
        log_folder=logs,
        resources=learner.resources,
        options_of=place.options,
    )
    return ActorGroup(
        "learner", tuple(launcher.launch(rank, config, *args, rank=rank) for rank in range(learner.num_ranks))
    )


def _start_learners(config: AnyRunConfig, learners: ActorGroup, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """References to the ranks' start by name, when rank 0 has said where they meet."""
    first = learners.name(0)
    calls = {f"{first} (host)": learners.identities()[first], first: learners.submit(0, "open_rendezvous")}
    timeout_s = config.cluster.start_timeout_s
    identity, port = gather(calls, phase="rendezvous", timeout_s=timeout_s, should_stop=should_stop)
    assert isinstance(identity, Identity)
    return learners.submit_all(START, identity.node_ip, port)
