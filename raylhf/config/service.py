"""A reward graph outside of a run: `raylhf serve-reward`, `raylhf score` and `raylhf reward eval`."""

from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, Field

from raylhf.config.base import Settings
from raylhf.config.cluster import ClusterConfig
from raylhf.config.load import validated
from raylhf.config.problems import Problem, problem_at
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.reward_checks import find_reward_problems
from raylhf.config.reward_leaves import Leaf
from raylhf.config.run import RunConfig
from raylhf.config.source import Source, read_source

ANY_HELD_OUT = 1
"""A service has no prompts, so a graph that would take its scale from held-out ones is told of by `notes` instead."""


class ServeConfig(Settings):
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that is listened on; 0.0.0.0 lets other machines in (plain HTTP: put TLS before it)."""
    port: int = Field(default=8080, ge=1, le=65_535)
    """Port that is listened on."""
    token_env: str = Field(default="RAYLHF_REWARD_TOKEN", min_length=1)
    """Environment variable that holds the bearer token."""
    token_file: str | None = None
    """File that holds the bearer token (relative to the current folder); then the variable is not read."""
    min_replicas: int = Field(default=1, ge=1)
    """Scorers that always run."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Scorers at most; null means reward.replicas, or min_replicas if that is more."""
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Batches in work or waiting for each scorer, above which Ray Serve adds one."""
    max_batch_size: int = Field(default=64, ge=1)
    """Samples scored together, over all requests that wait; a longer request is split."""
    batch_wait_s: float = Field(default=0.01, ge=0)
    """How long the first sample of a batch waits for others."""
    max_samples_per_request: int = Field(default=1024, ge=1)
    """A request with more is refused (413)."""
    max_request_bytes: int = Field(default=8_388_608, ge=1024)
    """A longer request is refused (413) and not read to its end."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one request, from its first byte to its answer (504)."""


class ServiceConfig(Settings):
    """What the three commands need; any file with a `reward:` section has it."""

    reward: RewardPlaneConfig
    """The reward plane."""
    serve: ServeConfig = ServeConfig()
    """The HTTP server."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster."""

    @property
    def max_replicas(self) -> int:
        """Scorers at most, after null is decided."""
        return self.serve.max_replicas or max(self.reward.replicas, self.serve.min_replicas)

    @property
    def scoring(self) -> RewardPlaneConfig:
        """The reward plane where a failed score is only told: no run to stop, and no prompt to sample anew."""
        return _without_failure_policies(self.reward)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what is other than in a run."""
        if not self.reward.has_state:
            return ()
        return (
            "the graph has whiten, adaptive or calibrate (source: reference) nodes, whose statistics come from a run's "
            "responses; here there are none, and these nodes leave scores as they are",
        )


def load_service_config(path: str | FilePath, overrides: Sequence[str] = ()) -> ServiceConfig:
    """The settings of a reward service, from a policy run's file or from one with `reward:` alone.

    The sections that only a run uses are left unread; an override of one of them is a mistake.

    Raises:
        ConfigError: one line for each problem: where it is written, the key, what is wrong, the remedy.
    """
    source = read_source(path, overrides)
    _leave_out_the_run(source)
    return validated(source, FilePath(path), ServiceConfig, lambda config: list(find_service_problems(config)))


def find_service_problems(config: ServiceConfig) -> Iterator[Problem]:
    """Settings that are each legal and do not make sense together."""
    for key, text in find_reward_problems(config.reward, held_out=ANY_HELD_OUT):
        yield problem_at(key, text)
    serve = config.serve
    if config.max_replicas < serve.min_replicas:
        yield problem_at(
            "serve.max_replicas",
            f"is {serve.max_replicas}, less than serve.min_replicas = {serve.min_replicas}; raise it, or make it null",
        )


def _leave_out_the_run(source: Source) -> None:
    """Take out of `source` what is known in a run's file and has no meaning for a service."""
    for name in RunConfig.model_fields.keys() - ServiceConfig.model_fields.keys():
        overridden = [
            origin for path, origin in source.origins.items() if path[:1] == (name,) and origin.startswith("override ")
        ]
        source.problems.extend(
            f"{origin}: {name}: is a run's setting; this command uses {', '.join(ServiceConfig.model_fields)} alone, "
            "so remove the override"
            for origin in dict.fromkeys(overridden)
        )
        source.data.pop(name, None)


def _without_failure_policies(node: Any) -> Any:
    """`node` with the leaves' `on_failure` at its default; the same word in a leaf's own data is left alone."""
    if isinstance(node, tuple):
        return tuple(map(_without_failure_policies, node))
    if not isinstance(node, BaseModel):
        return node
    changes = {name: _without_failure_policies(getattr(node, name)) for name in type(node).model_fields}
    return node.model_copy(update=changes | ({"on_failure": "drop"} if isinstance(node, Leaf) else {}))
