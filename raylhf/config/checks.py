"""Whether settings that are each legal make sense together. Every problem is found, none is repaired."""

from collections.abc import Iterator

from raylhf.config.devices import cpu_has_bfloat16
from raylhf.config.model import ModelConfig
from raylhf.config.objective_checks import check_objective
from raylhf.config.placement import EPSILON, place_config, roles_of
from raylhf.config.problems import Problem, problem_at
from raylhf.config.reward_checks import find_reward_problems
from raylhf.config.run import AnyRunConfig, RunConfig


def check_config(config: RunConfig) -> list[str]:
    """A sentence for each problem; empty where the settings make sense."""
    return [str(problem) for problem in find_problems(config)]


def find_problems(config: RunConfig) -> list[Problem]:
    """Every problem, in the order of the sections."""
    return [problem for check in CHECKS for problem in check(config)]


def _check_sampling(config: RunConfig) -> Iterator[Problem]:
    sampling = config.rollout.sampling
    why = "the objective needs the log-probability under the untruncated distribution that the learner computes"
    if sampling.top_p < 1:
        yield problem_at("rollout.sampling.top_p", f"is {sampling.top_p}, but {why}; set it to 1.0")
    if sampling.top_k != -1:
        yield problem_at("rollout.sampling.top_k", f"is {sampling.top_k}, but {why}; set it to -1 (off)")
    needed = config.data.max_prompt_tokens + sampling.max_response_tokens
    if config.max_model_len < needed:
        yield problem_at(
            "rollout.max_model_len",
            f"is {config.max_model_len}, less than data.max_prompt_tokens + rollout.sampling.max_response_tokens "
            f"= {needed}; raise it to {needed}, or leave it null",
        )


def _check_reward(config: RunConfig) -> Iterator[Problem]:
    for key, text in find_reward_problems(config.reward, held_out=config.data.held_out):
        yield problem_at(key, text)


def _check_batch(config: RunConfig) -> Iterator[Problem]:
    prompts, ranks = config.rollout.prompts_per_step, config.learner.num_ranks
    if prompts % ranks:
        yield problem_at(
            "rollout.prompts_per_step",
            f"is {prompts}, not a multiple of learner.num_ranks = {ranks}: whole groups live on one rank, and ranks "
            f"share equally; use {(prompts // ranks + 1) * ranks}",
        )
        return
    per_rank = config.responses_per_step // ranks
    minibatches = config.objective.num_minibatches
    if per_rank % minibatches:
        divisors = ", ".join(str(n) for n in range(1, min(per_rank, 256) + 1) if per_rank % n == 0)
        yield problem_at(
            "objective.num_minibatches",
            f"is {minibatches}, which does not divide the {per_rank} responses of a rank "
            f"({prompts} prompts x {config.rollout.group_size} / {ranks} ranks); use one of {divisors}",
        )


def check_devices(config: AnyRunConfig) -> Iterator[Problem]:
    """Arithmetic, attention and offload against the learner's device."""
    model, learner = config.model, config.learner
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield problem_at(
            "model.attention", "is flash_attention_2, which has no float32; set model.dtype: bfloat16 or sdpa"
        )
    if learner.offload_params and learner.zero_stage != 3:
        yield problem_at(
            "learner.offload_params",
            f"is true, but only ZeRO-3 partitions parameters; set zero_stage: 3 (it is {learner.zero_stage})",
        )
    if learner.offload_optimizer and learner.zero_stage == 0:
        yield problem_at("learner.offload_optimizer", "is true, but ZeRO-0 has no offload; set zero_stage: 1, 2 or 3")
    if learner.num_gpus > 0:
        return
    remedy = "set learner.num_gpus (and cluster.gpus_per_node)"
    default = ModelConfig(path="").attention
    if model.dtype == "bfloat16" and config.cluster.address is None and not cpu_has_bfloat16():
        yield problem_at(
            "model.dtype",
            "is bfloat16, but learner.num_gpus is 0 and this machine's CPU has no instructions for it (amx_bf16, "
            f"avx512_bf16), so that it would be many times slower; use float32, or {remedy}",
        )
    if model.attention == "flash_attention_2":
        yield problem_at("model.attention", f"is flash_attention_2, which needs a GPU; use {default}, or {remedy}")
    for name in ("offload_optimizer", "offload_params"):
        if getattr(learner, name):
            yield problem_at(
                f"learner.{name}", f"is true, but the learner is on the CPU, where nothing is left to offload; {remedy}"
            )


def check_tracking(config: AnyRunConfig) -> Iterator[Problem]:
    """A port for metrics that nobody would listen at."""
    port = config.tracking.prometheus_port
    if port is not None and config.cluster.address is not None:
        yield problem_at(
            "tracking.prometheus_port",
            f"is {port}, but cluster.address joins a Ray whose nodes export metrics at ports of their own "
            "(ray start --metrics-export-port); leave it null",
        )


def _check_engine_gpus(config: RunConfig) -> Iterator[Problem]:
    rollout, gpus_per_node = config.rollout, config.cluster.gpus_per_node
    tp, num_gpus = rollout.tensor_parallel_size, rollout.num_gpus
    if tp > 1 and num_gpus < tp:
        yield problem_at(
            "rollout.num_gpus", f"is {num_gpus:g}, but rollout.tensor_parallel_size is {tp}; set it to {tp}"
        )
    if num_gpus > tp:
        yield problem_at(
            "rollout.num_gpus",
            f"is {num_gpus:g}, but the engine uses rollout.tensor_parallel_size = {tp} GPUs; set them equal",
        )
    if tp > 1 and tp > gpus_per_node:
        yield problem_at(
            "rollout.tensor_parallel_size",
            f"is {tp}, but a node has cluster.gpus_per_node = {gpus_per_node}; an engine stays on one node",
        )
    for key, count in (("rollout.num_gpus", num_gpus), ("learner.num_gpus", config.learner.num_gpus)):
        if count > 1 and count != int(count):
            yield problem_at(key, f"is {count:g}; Ray gives a share of one GPU, or whole GPUs")
    if config.learner.num_gpus > 1:
        yield problem_at(
            "learner.num_gpus",
            f"is {config.learner.num_gpus:g}, but a rank uses one GPU; raise learner.num_ranks instead",
        )


def _check_weight_transfer(config: RunConfig) -> Iterator[Problem]:
    key, transport = "rollout.weight_transfer", config.weight_transfer
    rollout_gpus, learner_gpus = config.rollout.num_gpus, config.learner.num_gpus
    if (rollout_gpus > 0) != (learner_gpus > 0):
        yield problem_at(
            "learner.num_gpus" if learner_gpus == 0 else "rollout.num_gpus",
            f"learner.num_gpus is {learner_gpus:g} and rollout.num_gpus is {rollout_gpus:g}: no transport moves "
            "weights between a CPU and a GPU role; give both GPUs, or neither",
        )
        return
    if rollout_gpus == 0 and transport != "gloo":
        yield problem_at(key, f"is {transport}, which needs GPUs, but no role has one; use auto or gloo")
    if rollout_gpus > 0 and transport == "gloo":
        yield problem_at(key, "is gloo, which is for CPUs, but the roles have GPUs; use auto, nccl or ipc")
    is_shared = rollout_gpus > 0 and rollout_gpus + learner_gpus <= 1 + EPSILON
    if rollout_gpus > 0 and transport == "ipc" and not is_shared:
        yield problem_at(
            key,
            f"is ipc, where learner and rollout share a GPU, but their shares are {learner_gpus:g} + {rollout_gpus:g} "
            "> 1; lower the shares, or set whole GPUs and nccl",
        )
    pairs = max(config.rollout.replicas, config.learner.num_ranks)
    if rollout_gpus > 0 and transport == "ipc" and pairs > 1:
        yield problem_at(
            key,
            f"is ipc, which needs a learner and a rollout worker side by side on one GPU, but there are "
            f"{config.learner.num_ranks} ranks and {config.rollout.replicas} replicas, which Ray would pair at will; "
            "use whole GPUs and nccl, or one of each",
        )
    if rollout_gpus > 0 and transport == "nccl" and is_shared:
        yield problem_at(
            key, "is nccl, which refuses two processes on one GPU, but the roles share GPUs; use auto or ipc"
        )


def check_placement(config: AnyRunConfig) -> Iterator[Problem]:
    """Whether the roles find room on the cluster that the settings describe."""
    cluster = config.cluster
    if cluster.address is None and cluster.num_nodes > 1:
        yield problem_at(
            "cluster.num_nodes",
            f"is {cluster.num_nodes}, but cluster.address is null, which starts Ray on this machine alone; set "
            "cluster.address: auto",
        )
    roles = roles_of(config)
    cpus_each = cluster.cpus_per_node
    for role in roles:
        if role.num_cpus > cpus_each + EPSILON:
            yield problem_at(
                "cluster.cpus_per_node", f"is {cpus_each:g}, but one {role.name} worker asks for {role.num_cpus:g} CPUs"
            )
        if role.num_gpus > cluster.gpus_per_node + EPSILON:
            yield problem_at(
                "cluster.gpus_per_node",
                f"is {cluster.gpus_per_node}, but one {role.name} worker asks for {role.num_gpus:g} GPUs",
            )
    is_short = False
    for name, each in (("cpus", cpus_each), ("gpus", cluster.gpus_per_node)):
        wanted = sum(role.num_staying * getattr(role, f"num_{name}") for role in roles)
        if wanted > cluster.num_nodes * each + EPSILON:
            is_short = True
            terms = " + ".join(f"{role.name} {role.num_staying} x {getattr(role, f'num_{name}'):g}" for role in roles)
            yield problem_at(
                f"cluster.{name}_per_node",
                f"the roles ask for {wanted:g} {name.upper()[:-1]}s ({terms}), the cluster has {cluster.num_nodes} x "
                f"{each:g}: {wanted - cluster.num_nodes * each:g} are missing; add nodes, or lower replicas and shares",
            )
    if not is_short:
        yield from _check_nodes(config)


def _check_nodes(config: AnyRunConfig) -> Iterator[Problem]:
    cluster = config.cluster
    for role in place_config(config).unplaced:
        if role.num_gpus > cluster.gpus_per_node + EPSILON or role.num_cpus > cluster.cpus_per_node + EPSILON:
            continue  # named already: the worker fits on no node
        yield problem_at(
            "cluster.num_nodes",
            f"is {cluster.num_nodes}: the total suffices, but {role.replicas} {role.name} worker(s) of "
            f"{role.num_gpus:g} GPUs and {role.num_cpus:g} CPUs find no node with room for a whole one; add a node, or "
            "choose sizes that divide a node",
        )


def _check_evaluation(config: RunConfig) -> Iterator[Problem]:
    if config.evaluation.every_steps > 0 and config.data.held_out == 0:
        yield problem_at(
            "data.held_out",
            f"is 0, but evaluation.every_steps is {config.evaluation.every_steps}; hold prompts out, or set "
            "evaluation.every_steps: 0",
        )


def _check_replicas(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if not rollout.least_replicas <= rollout.replicas <= rollout.most_replicas:
        yield problem_at(
            "rollout.replicas",
            f"is {rollout.replicas}, outside of min_replicas={rollout.least_replicas} to "
            f"max_replicas={rollout.most_replicas}; the run starts with replicas workers",
        )
    if rollout.is_elastic and (problem := growth_problem(config)):
        yield problem_at("rollout.max_replicas", f"{problem}, or leave min_replicas and max_replicas out")


def growth_problem(config: RunConfig) -> str | None:
    """Why rollout workers cannot join a run that goes on; None where they can."""
    asks = "asks for rollout workers that come and go, but"
    if config.weight_transfer == "ipc":
        return (
            f"{asks} weights travel by ipc, inside of one GPU that learner and rollout share; give rollout workers "
            "whole GPUs (nccl)"
        )
    if (placement := config.rollout.placement).startswith("STRICT"):
        return (
            f"{asks} rollout.placement is {placement}, which holds only for workers that are there from the start; "
            f"set it to {placement.removeprefix('STRICT_')}"
        )
    return None


def _check_staleness(config: RunConfig) -> Iterator[Problem]:
    rollout, key = config.rollout, "rollout.max_staleness"
    if rollout.max_staleness == 0:
        return
    if rollout.importance_cap is None:
        yield problem_at(
            "rollout.importance_cap",
            f"is null, but {key} is {rollout.max_staleness}: responses of older weights count as if the present "
            f"ones had sampled them; set a cap such as 2.0, or {key}: 0",
        )
    if config.weight_transfer == "ipc":
        yield problem_at(
            key,
            f"is {rollout.max_staleness}, but learner and rollout share one GPU, on which they cannot work at the same "
            "time; set it to 0, or give both roles whole GPUs",
        )


CHECKS = (
    check_devices,
    _check_sampling,
    _check_engine_gpus,
    _check_replicas,
    _check_staleness,
    _check_weight_transfer,
    _check_reward,
    check_objective,
    _check_batch,
    _check_evaluation,
    check_placement,
    check_tracking,
)
