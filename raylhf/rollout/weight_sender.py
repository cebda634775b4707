"""The learner's end of a weight transfer, by transport. Importing this module does not import vllm.

vLLM's own trainer engines drive the rollout side through a client. Here the driver does that (it holds the workers), so
they get a client that only keeps what it is told to send.
"""

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raylhf.interfaces import WeightSender, WeightSource
from raylhf.rollout.gloo_stream import (
    DEFAULT_BUCKET_BYTES,
    TransferGroup,
    listen,
    open_group,
    send_parameters,
)

_FIRST_WORKER = 1  # rank 0 of the transfer group is the sender


def open_sender(
    backend: str, *, source: WeightSource, rank: int, world_size_of_rollout: int, host: str, timeout_s: float
) -> WeightSender:
    """The sender for `backend`; every learner rank makes one, rank 0 transmits.

    `host` is this node's address as the rollout workers reach it, `world_size_of_rollout` the number of vLLM workers
    (replicas times tensor parallel size).
    """
    if backend not in SENDERS:
        raise ValueError(f"rollout.weight_transfer is {backend!r}; choose one of {sorted(SENDERS)}")
    return SENDERS[backend](
        source=source, rank=rank, world_size=world_size_of_rollout + _FIRST_WORKER, host=host, timeout_s=timeout_s
    )


class GlooSender:
    """Sends over TCP from host memory: works everywhere."""

    def __init__(self, *, source: WeightSource, rank: int, world_size: int, host: str, timeout_s: float) -> None:
        self._source = source
        self._rank = rank
        self._world_size = world_size
        self._host = host
        self._timeout_s = timeout_s
        self._round = 0
        self._store: dist.TCPStore | None = None
        self._group: TransferGroup | None = None

    def prepare(self) -> dict[str, Any]:
        if self._rank != 0:
            return {}
        self._store = listen(timeout_s=self._timeout_s)
        return {
            "host": self._host,
            "port": self._store.port,
            "world_size": self._world_size,
            "rank_offset": _FIRST_WORKER,
            "bucket_bytes": DEFAULT_BUCKET_BYTES,
            "timeout_s": self._timeout_s,
        }

    def connect(self) -> None:
        if self._rank == 0:
            assert self._store is not None, "connect() before prepare()"
            self._group = open_group(
                self._host,
                self._store.port,
                rank=0,
                world_size=self._world_size,
                timeout_s=self._timeout_s,
                store=self._store,
            )

    def update_info(self) -> dict[str, Any]:
        self._round += 1
        return {} if self._rank != 0 else {**describe(self._source), "round": self._round}

    def send(self) -> None:
        if self._rank != 0:
            _join_gathering(self._source)
            return
        assert self._group is not None, "send() before connect()"
        parameters = iter(self._source)
        try:
            send_parameters(self._group, parameters, self._source.metadata(), round_=self._round)
        except RuntimeError:
            self._group.close()  # the receivers that are left need not wait for their deadline
            for _ in parameters:  # the other ranks gather them too
                pass
            raise

    def release(self) -> None:
        pass

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._store = None


class NCCLSender:
    """Sends between GPUs with vLLM's own engine."""

    def __init__(self, *, source: WeightSource, rank: int, world_size: int, host: str, timeout_s: float) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        # Copies: the engine packs several tensors at a time, but the source's are valid one at a time.
        self._source = _CopiedSource(source)
        engine_source: Any = self._source
        self._rank = rank
        self._world_size = world_size
        self._host = host
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._engine = NCCLTrainerWeightTransferEngine(
            client=_KeepingClient(), source=engine_source, is_sender=rank == 0
        )

    def prepare(self) -> dict[str, Any]:
        if self._rank != 0:
            return {}
        self._socket = socket.create_server((self._host, 0))
        return {
            "master_address": self._host,
            "master_port": self._socket.getsockname()[1],
            "world_size": self._world_size,
            "rank_offset": _FIRST_WORKER,
            "packed": self._engine.packed,
            "packed_buffer_size_bytes": self._engine.packed_buffer_size_bytes,
            "packed_num_buffers": self._engine.packed_num_buffers,
        }

    def connect(self) -> None:
        """What the engine's `trainer_init` does, but on the socket that listens already: no race for the port."""
        if self._rank != 0:
            return
        import torch
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        assert self._socket is not None, "connect() before prepare()"
        meeting = StatelessProcessGroup.create(
            self._host,
            self._socket.getsockname()[1],
            rank=0,
            world_size=self._world_size,
            store_timeout=int(self._timeout_s),
            listen_socket=self._socket,
        )
        with unpinned_nccl_env():
            self._engine.model_update_group = PyNcclCommunicator(meeting, torch.accelerator.current_device_index())

    def update_info(self) -> dict[str, Any]:
        return {} if self._rank != 0 else describe(self._source)

    def send(self) -> None:
        self._engine.send_weights()

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._engine.shutdown()


class IPCSender:
    """Hands GPU memory to an engine on the same GPU, by handle. Needs room for a copy of the weights."""

    def __init__(self, *, source: WeightSource, rank: int, world_size: int, host: str, timeout_s: float) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine

        self._client = _KeepingClient()
        self._source = _CopiedSource(source, keep=True)
        engine_source: Any = self._source  # vLLM's WeightSource is a base class, ours a Protocol of the same shape
        self._engine = IPCTrainerWeightTransferEngine(client=self._client, source=engine_source, is_sender=rank == 0)

    def prepare(self) -> dict[str, Any]:
        return {"packed": False}

    def connect(self) -> None:
        pass

    def update_info(self) -> dict[str, Any]:
        """Gathers the weights on every rank; the handles in the result are valid until `release`."""
        self.release()
        self._engine.send_weights()
        return self._client.take_payload()

    def send(self) -> None:
        pass

    def release(self) -> None:
        self._source.kept.clear()

    def close(self) -> None:
        self.release()


SENDERS = {"gloo": GlooSender, "nccl": NCCLSender, "ipc": IPCSender}


def describe(source: WeightSource) -> dict[str, Any]:
    """Names, types and shapes, as vLLM's update infos spell them."""
    metadata = source.metadata()
    return {
        "names": [m.name for m in metadata],
        "dtype_names": [str(m.dtype).removeprefix("torch.") for m in metadata],
        "shapes": [list(m.shape) for m in metadata],
    }


def _join_gathering(source: WeightSource) -> None:
    """Gathering a parameter is a collective: ranks that send nothing iterate too."""
    for _ in source:
        pass


class _CopiedSource:
    """A source whose tensors are copies of their own, kept until `kept` is cleared where `keep` asks for it."""

    def __init__(self, source: WeightSource, *, keep: bool = False) -> None:
        self.kept: list[Tensor] = []
        self._source = source
        self._keep = keep

    def metadata(self) -> Sequence[Any]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._source:
            copy = tensor.detach().clone()
            if self._keep:
                self.kept.append(copy)
            yield name, copy


class _KeepingClient:
    """Stands where vLLM's trainer engines expect the rollout side; keeps the payload of `update_weights`."""

    def __init__(self) -> None:
        self._payload: dict[str, Any] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict)
        self._payload = update_info

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass

    def take_payload(self) -> dict[str, Any]:
        payload, self._payload = self._payload, {}
        return payload
