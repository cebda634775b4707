"""Whether a run fits into the memory of the cluster that its settings describe."""

from dataclasses import dataclass
from typing import Literal

from raylhf.config.architecture import Architecture, architecture_of
from raylhf.config.learner_memory import estimate_learner
from raylhf.config.memory import GIB, MemoryEstimate, estimate_reward, estimate_rollout, kv_bytes_per_token
from raylhf.config.placement import Node, Placement, place_config
from raylhf.config.run import AnyRunConfig, RunConfig

TIGHT_SHARE = 0.9
"""An estimate above this share of a memory is worth a warning: fragmentation is not in it."""


@dataclass(frozen=True)
class Shortage:
    """Something that is too small, or nearly so."""

    kind: Literal["gpu", "host", "KV cache"]
    needed: float
    """Bytes; tokens of the KV cache."""
    available: float
    sentence: str
    """Without a remedy."""

    @property
    def is_fatal(self) -> bool:
        """Whether it does not fit; else it is tight."""
        return self.needed > self.available


@dataclass(frozen=True)
class Assessment:
    """Memory of all workers, where it lies, and what is short."""

    policy: Architecture
    critic: Architecture | None
    """Of a critic with its own trunk."""
    memory: tuple[MemoryEstimate, ...]
    """One worker of each role."""
    placement: Placement
    kv_cache_tokens: int | None
    """Tokens that the KV cache of one engine holds; None where nothing is sampled."""
    gpu_peak_bytes: float
    """On the fullest GPU."""
    host_peak_bytes: float
    """On the fullest node, the object store included."""
    shortages: tuple[Shortage, ...]


def has_own_critic(config: AnyRunConfig) -> bool:
    """Whether a critic is a model of its own."""
    return isinstance(config, RunConfig) and config.critic is not None and config.critic.trunk == "own"


def critic_architecture(config: AnyRunConfig, policy: Architecture | None) -> Architecture | None:
    """Of a critic with its own trunk; None without one, and where it is not known without a download."""
    if not isinstance(config, RunConfig) or config.critic is None or config.critic.trunk != "own":
        return None
    return architecture_of(config.critic.path) if config.critic.path else policy


def assess(config: AnyRunConfig) -> Assessment | None:
    """None where a model is not known without a download."""
    policy = architecture_of(config.model.path)
    critic = critic_architecture(config, policy)
    if policy is None or (critic is None and has_own_critic(config)):
        return None
    memory = (estimate_learner(config, policy, critic),)
    if isinstance(config, RunConfig):
        memory = (estimate_rollout(config, policy), estimate_reward(config), *memory)
    placement = place_config(config)
    gpu_peak, host_peak, node = _peaks(config, memory, placement)
    tokens = _kv_cache_tokens(config, policy, memory)
    shortages = [
        *_gpu_shortage(config, gpu_peak),
        *_host_shortage(config, host_peak, node),
        *_kv_shortage(config, tokens),
    ]
    return Assessment(policy, critic, memory, placement, tokens, gpu_peak, host_peak, tuple(shortages))


def _kv_cache_tokens(config: AnyRunConfig, policy: Architecture, memory: tuple[MemoryEstimate, ...]) -> int | None:
    if not isinstance(config, RunConfig):
        return None
    rollout = memory[0]
    cache = (rollout.device or rollout.host)["KV cache"]
    return int(cache / kv_bytes_per_token(config, policy))


def _peaks(config: AnyRunConfig, memory: tuple[MemoryEstimate, ...], placement: Placement) -> tuple[float, float, Node]:
    """Bytes on the fullest GPU, bytes on the fullest node, and that node."""
    by_role = {estimate.role: estimate for estimate in memory}
    nodes, store = placement.nodes, config.cluster.object_store_gib * GIB
    gpus = [
        sum(by_role[worker.role].device_bytes for worker in node.workers if gpu in worker.gpus)
        for node in nodes
        for gpu in range(config.cluster.gpus_per_node)
    ]
    hosts = [store + sum(by_role[worker.role].host_bytes for worker in node.workers) for node in nodes]
    fullest = max(range(len(nodes)), key=hosts.__getitem__)
    return max(gpus, default=0.0), hosts[fullest], nodes[fullest]


def _gpu_shortage(config: AnyRunConfig, peak: float) -> list[Shortage]:
    available = config.cluster.gpu_memory_gib * GIB
    if peak <= TIGHT_SHARE * available:
        return []
    where = f"about {peak / GIB:.1f} GiB on the fullest GPU of {config.cluster.gpu_memory_gib:g} GiB"
    return [Shortage("gpu", peak, available, f"{_verdict(peak, available)}: {where}")]


def _host_shortage(config: AnyRunConfig, peak: float, fullest: Node) -> list[Shortage]:
    available = config.cluster.host_memory_gib * GIB
    if peak <= TIGHT_SHARE * available:
        return []
    names = [worker.role for worker in fullest.workers]
    holds = " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    where = (
        f"about {peak / GIB:.1f} GiB in the memory of a node of {config.cluster.host_memory_gib:g} GiB "
        f"({holds}, and an object store of {config.cluster.object_store_gib:g} GiB)"
    )
    return [Shortage("host", peak, available, f"{_verdict(peak, available)}: {where}")]


def _kv_shortage(config: AnyRunConfig, tokens: int | None) -> list[Shortage]:
    if tokens is None or not isinstance(config, RunConfig) or tokens >= config.max_model_len:
        return []
    sentence = (
        f"does not fit: the KV cache of an engine holds about {tokens} tokens, less than one sequence of "
        f"{config.max_model_len}"
    )
    return [Shortage("KV cache", config.max_model_len, tokens, sentence)]


def _verdict(wanted: float, capacity: float) -> str:
    return "does not fit" if wanted > capacity else "is tight"
