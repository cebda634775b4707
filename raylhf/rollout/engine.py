"""The vLLM engine of a rollout worker: the only module that builds one."""

import os
from typing import TYPE_CHECKING, Any

from raylhf.config import RunConfig
from raylhf.rollout.orphans import own_future_children

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_GIB = 2**30
# Given by its path, because vLLM turns the short name `uni` into `mp` on a CPU, which costs a process of 0.6 GB.
_IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def build_engine(config: RunConfig, model_folder: str) -> "AsyncLLM":
    """Start vLLM: token ids in, token ids out. Call it in the thread whose event loop will use the engine.

    It sets this process's environment variables, so a process holds one engine, and vllm must not be imported before.
    """
    set_environment(config)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(config, model_folder)))


def set_environment(config: RunConfig) -> None:
    """What vLLM reads from the environment, here and in the processes that it starts."""
    own_future_children()
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(config.cluster.start_timeout_s))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if config.weight_transfer == "ipc":
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are pickled on their way to the engine core
    if config.rollout.num_gpus == 0:
        os.environ["OMP_NUM_THREADS"] = str(config.rollout.threads)
        # By default vLLM binds its threads to cores: replicas and learners would share some and leave others idle.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def engine_arguments(config: RunConfig, model_folder: str) -> dict[str, Any]:
    """vLLM's settings."""
    rollout = config.rollout
    arguments = {
        "model": model_folder,
        "trust_remote_code": config.model.trust_remote_code,
        "load_format": "auto" if config.model.trust_remote_code else "safetensors",  # no pickles
        "dtype": config.model.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "seed": config.seed,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's own sampling defaults
        "logprobs_mode": "processed_logprobs",  # of the tempered distribution that the token was drawn from
        "weight_transfer_config": {"backend": config.weight_transfer},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if rollout.num_gpus > 0:
        return arguments | {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    executor = _IN_ENGINE_CORE if rollout.tensor_parallel_size == 1 else "mp"
    kv_cache_bytes = int(rollout.kv_cache_gib * _GIB)
    return arguments | {
        "kv_cache_memory_bytes": kv_cache_bytes,
        "distributed_executor_backend": executor,
        # After a piece of a prompt vLLM sets the request's generator back, which torch's for the CPU cannot: it dies.
        "enable_chunked_prefill": False,
    }
