"""`raylhf doctor`: the checks in order, each within its deadline and all of them in less than a minute."""

import http.client
import os
import secrets
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylhf.cluster.actors import WorkerError
from raylhf.cluster.probe import Answer, RayNode, ask_nodes, joined_nodes, meet, transfer_rates
from raylhf.cluster.session import missing_nodes, preflight, ray_session
from raylhf.config.placement import reserved_roles, roles_of
from raylhf.config.plan import checkpoint_bytes, export_bytes
from raylhf.config.run import AnyRunConfig, RunConfig
from raylhf.driver.doctor import (
    ClockReading,
    DiskNeed,
    Finding,
    judge_arithmetic,
    judge_clocks,
    judge_collective,
    judge_disk,
    judge_memory,
    judge_nodes,
    judge_open_files,
    judge_rates,
    judge_shm,
    judge_silence,
    judge_storage,
    judge_tmp,
    judge_versions,
    judge_wandb,
)
from raylhf.driver.node_facts import (
    DRIVER_FILE,
    NodeFacts,
    clock,
    gloo_member,
    leave_canary,
    nccl_member,
    node_facts,
    replace_file,
    versions,
)
from raylhf.tracking.redaction import without_secrets
from raylhf.tracking.wandb_run import wandb_mode

TOTAL_S = 55.0
"""For all checks, from the moment that the nodes have joined or are given up."""
FACTS_S, STORAGE_S, CLOCK_S, RATE_S, COLLECTIVE_S = 20.0, 15.0, 5.0, 15.0, 40.0
"""Deadlines of single checks; less where less of the total is left."""
LEAST_S = 1.0
NUM_CLOCK_READINGS = 3
RATE_BYTES = 32 * 2**20
WANDB_URL = "https://api.wandb.ai"
WANDB_S = 5.0
POLL_S = 0.2


def examine(config: AnyRunConfig, *, wait_s: float) -> Iterator[Finding]:
    """Join Ray (or start it) as the run would, wait up to `wait_s` for the nodes, and check them."""
    wandb = WandbProbe(config)
    try:
        with ray_session(config.cluster, env={}):
            yield from Examination(config, wait_s=wait_s).run()
    except WorkerError as error:  # Ray does not start, or nobody answers at its address
        yield Finding("Ray", "FAIL", str(error), remedy="start Ray there, or correct cluster.address")
    yield from wandb.findings()


class Examination:
    """The checks of one cluster. A node that does not answer is named, and left out of those that follow."""

    def __init__(self, config: AnyRunConfig, *, wait_s: float) -> None:
        self._config = config
        cluster = config.cluster
        self._wait_s = 0.0 if cluster.address is None else wait_s
        self._nodes = joined_nodes(cluster.num_nodes, timeout_s=self._wait_s)
        self._deadline = time.monotonic() + TOTAL_S

    def run(self) -> Iterator[Finding]:
        """All checks, the quickest first."""
        config, names = self._config, [node.name for node in self._nodes]
        yield from judge_nodes(config.cluster, names, missing_nodes(), wait_s=self._wait_s)
        yield self._placement()
        for check in (self._facts, self._clocks, self._storage, self._rates, self._collectives):
            if self._nodes:
                yield from check()

    def _placement(self) -> Finding:
        config = self._config
        is_policy = isinstance(config, RunConfig)
        roles = reserved_roles(config, num_rollout=config.rollout.replicas) if is_policy else roles_of(config)
        try:
            preflight(roles)
        except ValueError as error:
            return Finding("placement", "FAIL", str(error))
        listed = ", ".join(f"{role.replicas} x {role.name}" for role in roles)
        return Finding("placement", "ok", f"there is room for {listed}")

    def _facts(self) -> Iterator[Finding]:
        answers = ask_nodes(node_facts, self._nodes, timeout_s=self._within(FACTS_S))
        yield from self._drop_silent("facts", answers)
        if not self._nodes:
            return
        facts: dict[str, NodeFacts] = {node.name: answers[node.name].value for node in self._nodes}
        stores = {node.name: node.resources.get("object_store_memory", 0.0) for node in self._nodes}
        yield from judge_versions(versions(), {node: fact.versions for node, fact in facts.items()})
        yield from judge_memory(facts, host_memory_gib=self._config.cluster.host_memory_gib)
        if self._config.model.dtype == "bfloat16" and self._config.learner.num_gpus == 0:
            yield from judge_arithmetic(facts)
        yield from judge_shm(facts, stores, has_gpus=uses_gpus(self._config))
        yield from judge_tmp(facts)
        yield from judge_open_files(facts)

    def _clocks(self) -> Iterator[Finding]:
        readings: dict[str, list[ClockReading]] = defaultdict(list)
        for _ in range(NUM_CLOCK_READINGS):
            answers = ask_nodes(clock, self._nodes, timeout_s=self._within(CLOCK_S))
            yield from self._drop_silent("clock", answers)
            if not self._nodes:
                return
            for node in self._nodes:
                answer = answers[node.name]
                readings[node.name].append(ClockReading(answer.sent_at, answer.value, answer.received_at))
        yield from judge_clocks(readings)

    def _storage(self) -> Iterator[Finding]:
        output = Path(self._config.output_dir).absolute()
        secret = secrets.token_hex(8)
        try:
            with canary_folder(output, secret) as folder:
                answers = ask_nodes(
                    leave_canary,
                    self._nodes,
                    timeout_s=self._within(STORAGE_S),
                    arguments_of=lambda node: (str(folder), node.node_id, secret),
                )
                yield from self._drop_silent("shared storage", answers)
                problems = {node.name: answers[node.name].value for node in self._nodes}
                wrote = [node for node in self._nodes if not problems[node.name]]
                unseen = self._unseen(folder, wrote, secret)
        except OSError as error:
            finding = f"the driver cannot write into {output} ({error.strerror})"
            yield Finding("shared storage", "FAIL", finding, remedy="give output_dir= on a disk that can be written")
            return
        if problems:
            yield from judge_storage(str(output), problems, unseen)
        need = disk_need(self._config)
        yield from judge_disk(str(output), free_bytes=shutil.disk_usage(output).free, need=need)

    def _unseen(self, folder: Path, nodes: list[RayNode], secret: str) -> list[str]:
        """Names of the nodes whose files do not appear here. Not looked at before: what a look misses is cached."""
        deadline = time.monotonic() + self._within(STORAGE_S)
        while unseen := [node.name for node in nodes if not _holds(folder / node.node_id, secret)]:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return unseen

    def _rates(self) -> Iterator[Finding]:
        if len(self._nodes) < 2:
            yield Finding("bandwidth", "skip", "there is one node")
            return
        answers = transfer_rates(self._nodes, num_bytes=RATE_BYTES, timeout_s=self._within(RATE_S))
        rates = {name: answer.value for name, answer in answers.items() if not answer.problem}
        yield from judge_rates(rates, {name: answer.problem for name, answer in answers.items() if answer.problem})

    def _collectives(self) -> Iterator[Finding]:
        yield from self._collective("gloo", gloo_member, self._nodes, num_gpus=0)
        if uses_gpus(self._config):
            with_gpus = [node for node in self._nodes if node.resources.get("GPU", 0) >= 1]
            yield from self._collective("NCCL", nccl_member, with_gpus, num_gpus=1)

    def _collective(
        self, name: str, build: Callable[[], Any], nodes: list[RayNode], *, num_gpus: float
    ) -> Iterator[Finding]:
        timeout_s = self._within(COLLECTIVE_S)
        answers = meet(build, nodes, num_gpus=num_gpus, timeout_s=timeout_s)
        seconds = max((answer.value for answer in answers.values() if not answer.problem), default=0.0)
        problems = {node: answer.problem for node, answer in answers.items()}
        yield from judge_collective(name, problems, seconds, had_time=timeout_s == COLLECTIVE_S)

    def _drop_silent(self, check: str, answers: dict[str, Answer]) -> Iterator[Finding]:
        silent = {name: answer.problem for name, answer in answers.items() if answer.problem}
        self._nodes = [node for node in self._nodes if node.name not in silent]
        yield from judge_silence(check, silent)

    def _within(self, most_s: float) -> float:
        """Seconds for a check."""
        return max(min(most_s, self._deadline - time.monotonic()), LEAST_S)


def uses_gpus(config: AnyRunConfig) -> bool:
    """Whether any role reserves a GPU."""
    return any(role.num_gpus > 0 for role in roles_of(config))


def disk_need(config: AnyRunConfig) -> DiskNeed | None:
    """What the run writes into its folder; None where the model's shape is not known without a download."""
    checkpoint, export = checkpoint_bytes(config), export_bytes(config)
    if checkpoint is None or export is None:
        return None
    there = list((Path(config.output_dir) / config.name / "checkpoints").glob("step_*"))
    return DiskNeed(checkpoint, export, config.checkpoint.keep + 1, len(there))


@contextmanager
def canary_folder(output: Path, secret: str) -> Iterator[Path]:
    """A folder below `output`, which is made, with a file of the driver; it is removed afterwards.

    Raises:
        OSError: it cannot be written.
    """
    folder = output / f".doctor-{secret}"
    folder.mkdir(parents=True)
    try:
        replace_file(folder / DRIVER_FILE, secret)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text() == text


class WandbProbe:
    """Asks W&B's server for any answer, beside the other checks: a name server may take long."""

    def __init__(self, config: AnyRunConfig) -> None:
        setting = config.tracking.wandb
        self._is_online = wandb_mode(setting) == "online"
        self._setting = setting
        self._url = os.environ.get("WANDB_BASE_URL") or WANDB_URL
        self._problem = f"no answer within {WANDB_S:.0f} s"
        self._thread = threading.Thread(target=self._ask, daemon=True)
        if self._is_online:
            self._thread.start()

    def findings(self) -> list[Finding]:
        """Wait for the answer, within a deadline."""
        if not self._is_online:
            why = "no WANDB_API_KEY" if self._setting == "auto" else f"tracking.wandb={self._setting}"
            return [Finding("W&B", "skip", f"the run sends nothing to a server ({why})")]
        self._thread.join(WANDB_S)
        return judge_wandb(without_secrets(self._url), without_secrets(self._problem))

    def _ask(self) -> None:
        try:
            with urllib.request.urlopen(self._url, timeout=WANDB_S):
                self._problem = ""
        except urllib.error.HTTPError as error:
            self._problem = f"it answers with {error.code}" if error.code >= 500 else ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._problem = str(error)
