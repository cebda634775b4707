"""vLLM's end of a weight transfer over gloo: the backend for CPU, where NCCL and CUDA IPC do not exist.

vLLM finds it through the entry point `vllm.general_plugins`, which it calls in each of its processes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from raylhf.rollout.adapter_stream import is_adapter_stream, with_adapters
from raylhf.rollout.gloo_stream import CorruptWeightsError, ParameterInfo, TransferGroup, open_group, receive_parameters
from raylhf.rollout.orphans import guard_against_orphanhood


@functools.cache
def register() -> None:
    """Make the backend known to vLLM under the name `gloo`, and let a vLLM process of ours die with its owner.

    Cached, because vLLM may call it more than once in a process and refuses a name that it already has.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine("gloo", __name__, GlooWeightTransferEngine.__name__)
    guard_against_orphanhood()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where to meet the sender."""

    host: str
    port: int
    world_size: int
    """The sender and all vLLM workers of all replicas."""
    rank_offset: int
    """Rank of this engine's first worker."""
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What the sender is about to send."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    round: int
    """The sender's count of transfers: a receiver that missed one notices."""


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives whole sets of weights under their checkpoint names, or adapters to the model folder's weights."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    model: Any
    _group: TransferGroup | None = None
    _bucket_bytes: int = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Meet the sender; blocks until every worker of every replica is there."""
        self.shutdown()
        self._bucket_bytes = init_info.bucket_bytes
        parallel = self.parallel_config
        self._group = open_group(
            init_info.host,
            init_info.port,
            rank=init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Prepare the model to take weights in checkpoint format, layer by layer."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Bring the loaded weights into the form that the kernels use."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self._is_tied():
            # The output layer shares the embedding's storage, but a CPU with packed kernels keeps a copy of its own.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive the weights and load them. After an error the model is partly updated; a later update may follow.

        Raises:
            CorruptWeightsError: what arrived is not what was sent.
            ValueError: the sender did not send all that the model has, or adapters to something else.
        """
        if self._group is None:
            raise RuntimeError("update_weights was called before join_transfer")
        fields = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        metadata = [ParameterInfo(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in fields]
        stream = receive_parameters(self._group, metadata, round_=update_info.round, bucket_bytes=self._bucket_bytes)
        try:
            if is_adapter_stream(update_info.names):
                self._load(with_adapters(self._folder_weights(), dict(stream), dtype=self.model_config.dtype))
            else:
                self._load(stream)
        except BaseException as error:
            if not isinstance(error, (CorruptWeightsError, ValueError)):
                self.shutdown()  # the connection failed: whoever waits for this end is told at once
            # vLLM would count what is loaded by now as part of the next update.
            self.finish_weight_update()
            raise

    def _load(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        expected = {name for name, _ in self.model.named_parameters()}
        if self._is_tied():  # it arrives as the embedding
            expected.discard("lm_head.weight")
        # Models with multi-token prediction insist on its weights; a trainer need not have them.
        with disable_mtp_completeness_check():
            try:
                loaded = self.model.load_weights(stream)
            finally:  # a loader that fails half-way must not leave the sender waiting
                for _ in stream:
                    pass
        # vLLM would silently keep the old values of what did not come.
        if loaded is not None and (missing := sorted(expected - loaded)):
            raise ValueError(f"the weight update has nothing for {missing}; the learner must send the whole model")

    def _folder_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What the engine loaded when it started, read again."""
        from vllm.model_executor.model_loader import get_model_loader

        loader: Any = get_model_loader(self.vllm_config.load_config)
        return loader.get_all_weights(self.model_config, self.model)

    def _is_tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
