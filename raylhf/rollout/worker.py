"""A rollout worker as a plain class; the cluster makes it an actor."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from raylhf.batch import FinishReason, Prompt, Rollouts
from raylhf.config import RunConfig
from raylhf.models.chat import encode_prompt
from raylhf.models.load import load_tokenizer, stop_token_ids
from raylhf.rollout.engine import build_engine
from raylhf.rollout.orphans import descendants, kill_survivors

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

_RECOVERY_S = 30.0
_CLOSE_PATIENCE_S = 5.0


class RolloutWorker:
    """One vLLM engine. Methods may be called concurrently on one event loop; vLLM batches what is in flight."""

    def __init__(self, config: RunConfig, model_folder: str, *, replica: int) -> None:
        self._config = config
        self._folder = model_folder
        self._replica = replica
        self._tokenizer = load_tokenizer(model_folder, trust_remote_code=config.model.trust_remote_code)
        self._stop_ids = stop_token_ids(model_folder, self._tokenizer)
        self._engine: AsyncLLM | None = None
        self._children: list[psutil.Process] = []
        self._num_requests = 0
        self._failed_update = ""
        self._sockets: tempfile.TemporaryDirectory[str]

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, *, policy_version: int = 0) -> dict[str, Any]:
        """Start the engine; the weights of the model folder are version `policy_version`."""
        began = time.perf_counter()
        # vLLM leaves its sockets' files behind: they get a folder that goes with the worker.
        self._sockets = tempfile.TemporaryDirectory(prefix="raylhf-")
        os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        before = set(descendants())
        # On the event loop, which it blocks: the engine's sockets belong to the loop of the thread that makes them.
        self._engine = build_engine(self._config, self._folder)
        self._children = [child for child in descendants() if child not in before]
        async with asyncio.timeout(self._config.cluster.start_timeout_s):
            await self._engine.update_weight_version(str(policy_version))
        return {"start_s": time.perf_counter() - began, "rss_bytes": self.rss_bytes()}

    def child_pids(self) -> list[int]:
        """The engine's processes, for a clean-up after this process's death."""
        return [child.pid for child in self._children]

    def rss_bytes(self) -> int:
        """Memory of this process and the engine's."""
        return sum(process.memory_info().rss for process in [psutil.Process(), *self._children])

    async def close(self) -> None:
        """Stop the engine; no process of it survives. Calling it again does nothing."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        children = {
            *self._children,
            *(c for child in self._children if child.is_running() for c in descendants(child.pid)),
        }
        try:
            # On the event loop: vLLM's output task would take the end of its process for a crash if it ran meanwhile.
            engine.shutdown(timeout=_CLOSE_PATIENCE_S)
        finally:
            await asyncio.to_thread(kill_survivors, list(children), patience_s=_CLOSE_PATIENCE_S)
            self._children = []
            self._sockets.cleanup()

    # --- sampling ---------------------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, *, num_responses: int, seed: int) -> tuple[Rollouts, dict[str, Any]]:
        """Sample a group; response j is drawn with `seed + j`, whatever else is in flight.

        What is in flight can still change the last bits of a larger model's log-probabilities, because matrix kernels
        depend on the batch size (1e-5 at 135M parameters in float32); the tiny model's are equal to the bit.

        Raises:
            ValueError: the prompt leaves no room for max_response_tokens.
            RuntimeError: the engine gave a response up, or holds half-updated weights.
        """
        began = time.perf_counter()
        if self._failed_update:
            raise RuntimeError(self._failed_update)
        prompt_ids = self._encode(prompt)
        async with asyncio.timeout(self._config.cluster.step_timeout_s):
            results = await asyncio.gather(*(self._sample(prompt_ids, seed + j) for j in range(num_responses)))
        rollouts = self._collect(prompt, prompt_ids, results)
        return rollouts, summarize(rollouts, self._stop_ids, seconds=time.perf_counter() - began)

    def _encode(self, prompt: Prompt) -> list[int]:
        prompt_ids = encode_prompt(self._tokenizer, prompt.messages)
        needed = len(prompt_ids) + self._config.rollout.sampling.max_response_tokens
        if needed > self._config.max_model_len:
            raise ValueError(
                f"prompt {prompt.index} has {len(prompt_ids)} tokens; with max_response_tokens it needs {needed}, but "
                f"rollout.max_model_len is {self._config.max_model_len}: raise it or lower data.max_prompt_tokens"
            )
        return prompt_ids

    async def _sample(self, prompt_ids: Sequence[int], seed: int) -> "RequestOutput":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        assert self._engine is not None, "generate() before start() or after close()"
        sampling = self._config.rollout.sampling
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=list(self._stop_ids),
            ignore_eos=True,  # the list above decides
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._num_requests += 1
        request_id = f"{self._replica}-{self._num_requests}"
        outputs = self._engine.generate({"prompt_token_ids": list(prompt_ids)}, parameters, request_id)
        return [output async for output in outputs][-1]

    def _collect(self, prompt: Prompt, prompt_ids: Sequence[int], results: Sequence["RequestOutput"]) -> Rollouts:
        """Translate vLLM's names into ours."""
        completions = [result.outputs[0] for result in results]
        response_ids = [list(completion.token_ids) for completion in completions]
        reasons: list[FinishReason] = [
            self._finish_reason(c.finish_reason, ids) for c, ids in zip(completions, response_ids, strict=True)
        ]
        return Rollouts(
            prompts=[prompt] * len(completions),
            prompt_ids=[np.asarray(prompt_ids, dtype=np.int64)] * len(completions),
            response_ids=[np.array(ids, dtype=np.int64) for ids in response_ids],
            rollout_logprobs=[_sampled_logprobs(completion) for completion in completions],
            response_texts=[self._decode(ids) for ids in response_ids],
            finish_reasons=reasons,
            policy_versions=np.array([_oldest_version(completion) for completion in completions], dtype=np.int64),
            temperature=self._config.rollout.sampling.temperature,
        )

    def _decode(self, response_ids: list[int]) -> str:
        """The text without the token that ended it, which need not be one that the tokenizer calls special."""
        ends_by_policy = response_ids and response_ids[-1] in self._stop_ids
        text = self._tokenizer.decode(response_ids[:-1] if ends_by_policy else response_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _finish_reason(self, reason: str | None, token_ids: Sequence[int]) -> FinishReason:
        ends_by_policy = bool(token_ids) and token_ids[-1] in self._stop_ids
        if reason == "stop" and ends_by_policy:
            return "stop"
        if reason == "length" and not ends_by_policy:
            return "length"
        raise RuntimeError(
            self._failed_update or f"vLLM ended a response with {reason!r} after {len(token_ids)} tokens"
        )

    # --- weights ----------------------------------------------------------------------------------------------------

    async def join_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Join the weight-transfer group; waits for all the others. The same `init_info` goes to every replica."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        assert self._engine is not None, "join_transfer() before start()"
        info = dict(init_info)
        if "rank_offset" in info:
            info["rank_offset"] += self._replica * self._config.rollout.tensor_parallel_size
        async with asyncio.timeout(self._config.cluster.start_timeout_s):
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(info))

    async def update_weights(self, update_info: Mapping[str, Any], *, policy_version: int) -> int:
        """Take one set of weights and return the version read back.

        Responses in flight are frozen meanwhile; afterwards their prefixes are computed anew, under the new weights.
        After an error they fail, and the worker samples nothing until an update succeeds.

        Raises:
            RuntimeError: the engine reports another version, or could not drop its caches.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        assert self._engine is not None, "update_weights() before start()"
        if self._failed_update and self._config.weight_transfer != "gloo":
            raise RuntimeError(self._failed_update)  # vLLM's own backends cannot start over
        async with asyncio.timeout(self._config.cluster.step_timeout_s), self._paused(self._engine):
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(dict(update_info)))
            await self._engine.finish_weight_update(str(policy_version))
            if not await self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM could not drop the prefix cache, which was built with the old weights")
            version = int(await self._engine.get_weight_version())
            if version != policy_version:
                raise RuntimeError(f"vLLM serves weights version {version} after an update to {policy_version}")
        self._failed_update = ""
        return version

    @asynccontextmanager
    async def _paused(self, engine: "AsyncLLM") -> AsyncIterator[None]:
        """Requests are frozen inside and go on afterwards; after an error they are aborted instead."""
        try:
            await engine.pause_generation(mode="keep", clear_cache=False)
            yield
        except BaseException as error:
            self._failed_update = f"rollout worker {self._replica} holds half-updated weights: {error!r}; restart it"
            async with asyncio.timeout(_RECOVERY_S):
                await engine.pause_generation(mode="abort", clear_cache=False)
            raise
        finally:
            async with asyncio.timeout(_RECOVERY_S):
                await engine.resume_generation()


def _sampled_logprobs(completion: "CompletionOutput") -> np.ndarray:
    """Log-probability of each sampled token, float32 [T]."""
    assert completion.logprobs is not None
    steps = zip(completion.token_ids, completion.logprobs, strict=True)
    return np.array([(candidates or {})[token].logprob for token, candidates in steps], dtype=np.float32)


def _oldest_version(completion: "CompletionOutput") -> int:
    """A response during which the weights changed counts as the older version's."""
    assert completion.weight_versions
    return int(completion.weight_versions[0].version)


def summarize(rollouts: Rollouts, stop_ids: Sequence[int], *, seconds: float) -> dict[str, Any]:
    """What the driver may read without fetching the rollouts."""
    lengths = rollouts.response_lengths
    return {
        "num_tokens": int(lengths.sum()),
        "lengths": lengths.tolist(),
        "num_truncated": int(rollouts.is_truncated.sum()),
        "num_zero_length": sum(all(token in stop_ids for token in ids) for ids in rollouts.response_ids),
        "policy_version": int(rollouts.policy_versions.min()),
        "seconds": seconds,
    }
