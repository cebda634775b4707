"""A rollout worker as a plain class; the cluster makes it an actor."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from raylhf.batch import FinishReason, Prompt, Rollouts
from raylhf.config import RunConfig
from raylhf.config.cluster import PRIVATE_FOLDER_VARIABLE
from raylhf.failures import BrokenWorkerError, ResponsesLostError
from raylhf.models.chat import encode_prompt
from raylhf.models.load import load_tokenizer, stop_token_ids
from raylhf.rollout.engine import build_engine
from raylhf.rollout.orphans import descendants, kill_survivors

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
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
        self._has_joined = False
        self._sockets: tempfile.TemporaryDirectory[str]

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, *, policy_version: int = 0) -> dict[str, Any]:
        """Start the engine; the weights of the model folder are version `policy_version`."""
        began = time.perf_counter()
        # vLLM leaves its sockets' files behind: their folder goes with the worker or, after a kill, the run.
        self._sockets = tempfile.TemporaryDirectory(prefix="raylhf-", dir=os.environ.get(PRIVATE_FOLDER_VARIABLE))
        os.environ["VLLM_RPC_BASE_PATH"] = self._sockets.name
        before = set(descendants())
        # On the event loop, which it blocks: the engine's sockets belong to the loop of the thread that makes them.
        self._engine = build_engine(self._config, self._folder)
        self._children = [child for child in descendants() if child not in before]
        async with asyncio.timeout(self._config.cluster.start_timeout_s):
            await self._engine.update_weight_version(str(policy_version))
        seconds = time.perf_counter() - began
        print(f"rollout worker {self._replica} is ready after {seconds:.1f} s", flush=True)
        return {
            "start_s": seconds,
            "rss_bytes": self.rss_bytes(),
            # For a clean-up after this process's death.
            "children": [(child.pid, child.create_time()) for child in self._children],
        }

    async def ping(self) -> int:
        """The version of the weights, asked of the engine's own process: it answers between two of its steps.

        Raises:
            BrokenWorkerError: that process is gone.
        """
        assert self._engine is not None, "ping() before start()"
        with self._telling_of_a_dead_engine():
            return int(await self._engine.get_weight_version())

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

    async def generate(
        self, prompt: Prompt, *, num_responses: int, seed: int, with_sample: bool = False
    ) -> tuple[Rollouts, dict[str, Any]]:
        """Sample a group; response j is drawn with `seed + j`, whatever else is in flight.

        The second value is a summary that the driver may read; `with_sample` adds the first response for people.

        What is in flight can still change the last bits of a larger model's log-probabilities, because matrix kernels
        depend on the batch size (1e-5 at 135M parameters in float32); the tiny model's are equal to the bit.

        Raises:
            ValueError: the prompt leaves no room for max_response_tokens.
            BrokenWorkerError: the engine's process is gone, it holds half-updated weights, or it takes longer than
                cluster.step_timeout_s.
            ResponsesLostError: a weight sync failed meanwhile.
            RuntimeError: the engine ended a response as nobody asked it to.
        """
        began = time.perf_counter()
        if self._failed_update:
            raise BrokenWorkerError(self._failed_update)
        prompt_ids = self._encode(prompt)
        with self._telling_of_a_dead_engine():
            timeout_s = self._config.cluster.step_timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    results = await asyncio.gather(*(self._sample(prompt_ids, seed + j) for j in range(num_responses)))
            except TimeoutError:
                raise BrokenWorkerError(f"prompt {prompt.index} had no responses within {timeout_s:g} s") from None
        rollouts = self._collect(prompt, prompt_ids, results)
        summary = summarize(rollouts, self._stop_ids, seconds=time.perf_counter() - began)
        return rollouts, summary | ({"sample": sample_of(rollouts)} if with_sample else {})

    @contextmanager
    def _telling_of_a_dead_engine(self) -> Iterator[None]:
        """Whatever goes wrong after the engine's process has ended is a broken worker."""
        try:
            yield
        except Exception as error:
            if self._engine is not None and self._engine.errored:
                raise BrokenWorkerError(f"vLLM's engine process is gone: {error!r}") from error
            raise

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
            policy_versions=[_versions(completion) for completion in completions],
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
        if reason == "abort":  # by `_paused`, the only one who aborts
            raise ResponsesLostError("its responses were given up in a weight sync that failed")
        raise RuntimeError(f"vLLM ended a response with {reason!r} after {len(token_ids)} tokens")

    # --- weights ----------------------------------------------------------------------------------------------------

    async def join_transfer(self, init_info: Mapping[str, Any], *, place: int) -> None:
        """Join a weight-transfer group as its engine number `place`, and leave an earlier one; waits for the others.

        The same `init_info` goes to every worker.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        assert self._engine is not None, "join_transfer() before start()"
        info = dict(init_info)
        if "rank_offset" in info:
            info["rank_offset"] += place * self._config.rollout.tensor_parallel_size
        with self._telling_of_a_dead_engine():
            async with asyncio.timeout(self._config.cluster.start_timeout_s):
                if self._has_joined:
                    await self._engine.shutdown_weight_transfer_engine()
                self._has_joined = True
                await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(info))

    async def update_weights(self, update_info: Mapping[str, Any], *, policy_version: int) -> int:
        """Take one set of weights and return the version read back.

        Responses in flight are frozen meanwhile; afterwards their prefixes are computed anew, under the new weights.
        After an error they are lost, and the worker samples nothing until an update succeeds.

        Raises:
            BrokenWorkerError: the engine's process is gone.
            RuntimeError: the engine reports another version, or could not drop its caches.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        assert self._engine is not None, "update_weights() before start()"
        if self._failed_update and self._config.weight_transfer != "gloo":
            raise BrokenWorkerError(self._failed_update)  # vLLM's own backends cannot start over
        with self._telling_of_a_dead_engine():
            await self._update(self._engine, WeightTransferUpdateRequest(dict(update_info)), policy_version)
        self._failed_update = ""
        return policy_version

    async def _update(self, engine: "AsyncLLM", request: "WeightTransferUpdateRequest", policy_version: int) -> None:
        async with asyncio.timeout(self._config.cluster.step_timeout_s), self._paused(engine):
            await engine.start_weight_update()
            await engine.update_weights(request)
            await engine.finish_weight_update(str(policy_version))
            if not await engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM could not drop the prefix cache, which was built with the old weights")
            version = int(await engine.get_weight_version())
            if version != policy_version:
                raise RuntimeError(f"vLLM serves weights version {version} after an update to {policy_version}")

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


def _versions(completion: "CompletionOutput") -> np.ndarray:
    """Version of the weights that sampled each token, int64 [T]."""
    versions = np.full(len(completion.token_ids), -1, dtype=np.int64)
    for span in completion.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    if (versions < 0).any():
        raise RuntimeError(f"vLLM gave no version of the weights for {int((versions < 0).sum())} tokens of a response")
    return versions


def summarize(rollouts: Rollouts, stop_ids: Sequence[int], *, seconds: float) -> dict[str, Any]:
    """What the driver may read without fetching the rollouts."""
    lengths = rollouts.response_lengths
    return {
        "num_tokens": int(lengths.sum()),
        "lengths": lengths.tolist(),
        "num_truncated": int(rollouts.is_truncated.sum()),
        "num_zero_length": sum(all(token in stop_ids for token in ids) for ids in rollouts.response_ids),
        "policy_version": rollouts.oldest_version,
        "version_sum": sum(int(versions.sum()) for versions in rollouts.policy_versions),
        "num_mixed": sum(len(set(versions.tolist())) > 1 for versions in rollouts.policy_versions),
        "seconds": seconds,
    }


def sample_of(rollouts: Rollouts) -> dict[str, Any]:
    """The first response as a row of `samples.jsonl`, without its score."""
    return {
        "prompt_index": rollouts.prompts[0].index,
        "prompt": rollouts.prompts[0].text,
        "response": rollouts.response_texts[0],
        "finish_reason": rollouts.finish_reasons[0],
        "policy_version": rollouts.select([0]).oldest_version,
    }
