"""Which settings would make a run fit: each is tried by the same arithmetic, the smallest change first."""

from collections.abc import Iterator, Sequence
from typing import Any

from raylhf.config.checks import find_problems
from raylhf.config.fitting import assess, has_own_critic
from raylhf.config.offline_checks import find_preference_problems
from raylhf.config.reward_model import RewardModelConfig
from raylhf.config.reward_model_checks import find_reward_model_problems
from raylhf.config.run import AnyRunConfig, PreferenceRunConfig, RunConfig
from raylhf.config.workload import longest_row, tokens_in_pass

Change = dict[str, Any]
"""New values by dotted key."""
SMALLEST_CHUNK = 128
LORA_RANK = 16
LEAST_CACHE_GIB = 0.0625
LEAST_STORE_GIB = 0.25


def find_remedy(config: AnyRunConfig) -> Change | None:
    """The smallest change that makes the run fit (or, where it is only tight, leaves it room); None if none does.

    One setting is preferred to several, and of the settings those that cost least: memory that nothing needs, then
    time, then what is learnt.
    """
    before = assess(config)
    if before is None or not before.shortages:
        return None
    may_be_tight = any(shortage.is_fatal for shortage in before.shortages)
    base: Change = {}
    if any(shortage.kind == "KV cache" for shortage in before.shortages):
        base = next((change for change in _larger_caches(config) if _holds_a_sequence(config, change)), {})
    if base and _fits(config, base, may_be_tight=may_be_tight):
        return base
    ladders = [[base | change for change in ladder] for ladder in _ladders(config) if ladder]
    for ladder in ladders:
        for change in ladder:
            if _fits(config, change, may_be_tight=may_be_tight):
                return _pruned(config, change, may_be_tight=may_be_tight)
    return _combination(config, ladders, may_be_tight=may_be_tight)


def changed(config: AnyRunConfig, change: Change) -> AnyRunConfig | None:
    """The settings with the change, or None where they no longer make sense together."""
    raw = config.model_dump()
    for key, value in change.items():
        *above, last = key.split(".")
        node = raw
        for name in above:
            node = node[name]
        node[last] = value
    new = type(config).model_validate(raw)
    if isinstance(new, RunConfig):
        problems = find_problems(new)
    else:
        is_preference = isinstance(new, PreferenceRunConfig)
        problems = find_preference_problems(new) if is_preference else find_reward_model_problems(new)
    return None if problems else new


def show(change: Change) -> str:
    """As it is written on a command line."""
    return " ".join(f"{key}={_yaml(value)}" for key, value in change.items())


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _fits(config: AnyRunConfig, change: Change, *, may_be_tight: bool) -> bool:
    new = changed(config, change)
    found = assess(new) if new is not None else None
    if found is None:
        return False
    return not any(shortage.is_fatal or not may_be_tight for shortage in found.shortages)


def _combination(config: AnyRunConfig, ladders: Sequence[Sequence[Change]], *, may_be_tight: bool) -> Change | None:
    """The strongest rungs together, until it fits; then without those that it fits without, and with weaker ones."""
    chosen: list[tuple[Sequence[Change], Change]] = []
    together: Change = {}
    for ladder in ladders:
        if changed(config, together | ladder[-1]) is None:
            continue
        chosen.append((ladder, ladder[-1]))
        together |= ladder[-1]
        if _fits(config, together, may_be_tight=may_be_tight):
            break
    else:
        return None
    for i in reversed(range(len(chosen))):
        others = chosen[:i] + chosen[i + 1 :]
        for weaker in ({}, *chosen[i][0]):
            trial = _joined([change for _, change in others] + [weaker])
            if _fits(config, trial, may_be_tight=may_be_tight):
                chosen[i] = (chosen[i][0], weaker)
                break
    return _pruned(config, _joined([change for _, change in chosen]), may_be_tight=may_be_tight)


def _pruned(config: AnyRunConfig, change: Change, *, may_be_tight: bool) -> Change:
    """Without the keys that it fits without."""
    for key in reversed(change):
        without = {other: value for other, value in change.items() if other != key}
        if _fits(config, without, may_be_tight=may_be_tight):
            change = without
    return change


def _joined(changes: Sequence[Change]) -> Change:
    return {key: value for change in changes for key, value in change.items()}


def _ladders(config: AnyRunConfig) -> Iterator[list[Change]]:
    """Ways to need less memory, the cheapest first; the rungs of each go from a small change to a large one."""
    learner, cluster = config.learner, config.cluster
    if isinstance(config, RunConfig):
        yield _smaller_caches(config)
    yield [{"learner.logprob_chunk": n} for n in _halves(learner.logprob_chunk, SMALLEST_CHUNK)]
    least = longest_row(config)  # fewer tokens would change nothing: a row is never cut
    yield [{"learner.micro_batch_tokens": n} for n in _halves(max(tokens_in_pass(config), least), least)]
    stores = _halves(cluster.object_store_gib, LEAST_STORE_GIB)
    yield [{"cluster.object_store_gib": n} for n in stores]
    yield [{"learner.gradient_checkpointing": True}] if not learner.gradient_checkpointing else []
    stages = range(learner.zero_stage + 1, 4) if learner.num_ranks > 1 else ()
    yield [{"learner.zero_stage": stage} for stage in stages]
    yield from _sizes(config)
    if learner.num_gpus > 0:
        least_stage = {"learner.zero_stage": 1} if learner.zero_stage == 0 else {}
        yield [{"learner.offload_optimizer": True, **least_stage}] if not learner.offload_optimizer else []
        whole = {"learner.zero_stage": 3, "learner.offload_optimizer": True, "learner.offload_params": True}
        yield [whole] if not learner.offload_params else []
    kept = {f"learner.{name}": False for name in ("offload_params", "offload_optimizer") if getattr(learner, name)}
    yield [kept] if kept else []
    yield [{"objective.critic.trunk": "shared"}] if has_own_critic(config) else []
    objective = config.objective
    if isinstance(objective, RewardModelConfig) and objective.trainable_layers is None:
        yield [{"objective.trainable_layers": 4}] if learner.lora is None else []
    yield [{"learner.lora": {"rank": LORA_RANK}}] if learner.lora is None else []


def _smaller_caches(config: RunConfig) -> list[Change]:
    """Less memory for the engine where the learner has its memory on the same GPU or in the same host."""
    rollout = config.rollout
    if rollout.num_gpus == 0:
        return [{"rollout.kv_cache_gib": n} for n in _halves(rollout.kv_cache_gib, LEAST_CACHE_GIB)]
    if config.weight_transfer != "ipc":
        return []
    shares = [round(0.05 * i, 2) for i in reversed(range(4, 20))]
    return [{"rollout.gpu_memory_utilization": n} for n in shares if n < rollout.gpu_memory_utilization]


def _larger_caches(config: AnyRunConfig) -> Iterator[Change]:
    """For an engine that cannot hold one sequence."""
    if not isinstance(config, RunConfig):
        return
    rollout = config.rollout
    if rollout.num_gpus == 0:
        yield from ({"rollout.kv_cache_gib": rollout.kv_cache_gib * 2**i} for i in range(1, 11))
        return
    shares = [round(0.05 * i, 2) for i in range(4, 20)]
    yield from ({"rollout.gpu_memory_utilization": n} for n in shares if n > rollout.gpu_memory_utilization)
    yield from _wider_engines(config)


def _holds_a_sequence(config: AnyRunConfig, change: Change) -> bool:
    new = changed(config, change)
    found = assess(new) if new is not None else None
    return found is not None and not any(shortage.kind == "KV cache" for shortage in found.shortages)


def _wider_engines(config: RunConfig) -> list[Change]:
    """Engines over more GPUs, and fewer of them."""
    if config.weight_transfer != "nccl":
        return []
    rollout, rungs = config.rollout, []
    for i in range(1, 4):
        size, replicas = rollout.tensor_parallel_size * 2**i, max(1, rollout.replicas // 2**i)
        rungs.append({"rollout.tensor_parallel_size": size, "rollout.num_gpus": float(size)})
        rungs[-1] |= {"rollout.replicas": replicas} if replicas != rollout.replicas else {}
    return rungs


def _sizes(config: AnyRunConfig) -> Iterator[list[Change]]:
    """More ranks to share the states; engines over more GPUs, and fewer of them."""
    learner = config.learner
    yield [{"learner.num_ranks": learner.num_ranks * 2**i} for i in range(1, 7)] if learner.zero_stage > 0 else []
    if learner.num_ranks > 1 and learner.num_gpus == 0:  # each has copies in the memory of the same node
        yield [{"learner.num_ranks": n} for n in _halves(learner.num_ranks, 1)]
    if isinstance(config, RunConfig):
        yield _wider_engines(config)


def _halves(value: float, least: float) -> list[Any]:
    """value / 2, value / 4, ... down to `least`."""
    found, is_whole = [], isinstance(value, int)
    while (value := value // 2 if is_whole else value / 2) >= least:
        found.append(value)
    return found
