"""Weights over gloo: both ends of the wire.

The parameters form one byte stream in the order of their metadata, cut into buckets of equal size, so that a parameter
larger than a bucket spans several. A bucket travels as one broadcast from rank 0: its bytes, then a trailer with their
checksum, the bucket's index and the round of the transfer. The receiver compares all three before it hands anything on.

Both ends have two buffers: while a bucket is on the wire, the sender fills the next one (gathers, merges, copies) and
the receiver hands the one before on.
"""

import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_BUCKET_BYTES = 8 * 2**20
"""Small enough that a bucket is still in a processor's cache when it is summed and sent, large enough for a network."""
_TRAILER_BYTES = 3 * 8
_BLOCK_BYTES = 4096
_NUM_BUFFERS = 2


class Transfer(Protocol):
    """A broadcast under way. It keeps its buffer alive."""

    def wait(self) -> object:
        """Until it has ended; raises RuntimeError when a peer is gone or the deadline passes."""
        ...


class Metadata(Protocol):
    """Name, type and shape of a parameter."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class ParameterInfo:
    """Name, type and shape of a parameter, as the receiver was told."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of parameter `index`, in one bucket."""

    index: int
    start: int
    stop: int


class CorruptWeightsError(RuntimeError):
    """Bytes that arrived are not those that were sent; the message names the parameters."""


class TransferGroup:
    """Rank 0, which sends, and the receivers. It leaves torch's default process group alone."""

    def __init__(self, store: dist.Store, *, host: str, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store  # kept alive: rank 0's store is the server
        backend: Any = dist.ProcessGroupGloo  # its type stub lacks what is used here
        options = backend._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [backend.create_device(hostname=host)]
        self._gloo: Any = backend(dist.PrefixStore("gloo/", store), rank, world_size, options)

    def start(self, buffer: Tensor) -> Transfer:
        """Begin to bring rank 0's buffer to all, on a thread of gloo; leave the buffer alone until `wait` returns."""
        if self._gloo is None:
            raise RuntimeError("this weight-transfer group is closed")
        return self._gloo.broadcast([buffer], dist.BroadcastOptions())

    def close(self) -> None:
        self._gloo = None


def listen(*, timeout_s: float) -> dist.TCPStore:
    """Rank 0's meeting point, on a port that the operating system chose (`.port`). Does not wait for anyone."""
    return dist.TCPStore(
        "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )


def open_group(
    host: str, port: int, *, rank: int, world_size: int, timeout_s: float, store: dist.TCPStore | None = None
) -> TransferGroup:
    """Meet the others at rank 0's `host` and `port`; blocks until all are there. Rank 0 passes its `listen()` store.

    Raises:
        TimeoutError: not everyone came; on rank 0 the message names the missing ranks.
    """
    deadline = timedelta(seconds=timeout_s)
    try:
        if store is None:
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=deadline)
        store.set_timeout(deadline)
        store.set(f"joined/{rank}", "1")
        store.wait([f"joined/{other}" for other in range(world_size)], deadline)
    except dist.DistError as error:
        raise TimeoutError(_absence(store, host, port, world_size, timeout_s)) from error
    own_host = host if rank == 0 else _address_towards(host, port)
    return TransferGroup(store, host=own_host, rank=rank, world_size=world_size, timeout_s=timeout_s)


def plan_buckets(metadata: Sequence[Metadata], bucket_bytes: int) -> list[list[Segment]]:
    """The segments of every bucket. Both ends compute the same plan from the same metadata."""
    buckets: list[list[Segment]] = []
    free = 0
    for index, info in enumerate(metadata):
        size, start = _num_bytes(info), 0
        while start < size:
            if free == 0:
                buckets.append([])
                free = bucket_bytes
            stop = min(size, start + free)
            buckets[-1].append(Segment(index, start, stop))
            free -= stop - start
            start = stop
    return buckets


def send_parameters(
    group: TransferGroup,
    parameters: Iterable[tuple[str, Tensor]],
    metadata: Sequence[Metadata],
    *,
    round_: int,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> None:
    """Send every parameter. Each is copied into a bucket before the next one is asked for, on the calling thread.

    Whatever happens, nothing is on the wire when it returns.

    Raises:
        ValueError: `parameters` differ from `metadata`.
        RuntimeError: a peer is gone, or the deadline passed.
    """
    under_way: Transfer | None = None
    try:
        for bucket in _filled_buckets(parameters, metadata, round_, bucket_bytes):
            if under_way is not None:
                sent, under_way = under_way, None
                sent.wait()
            under_way = group.start(bucket)
    finally:
        if under_way is not None:
            under_way.wait()


def receive_parameters(
    group: TransferGroup, metadata: Sequence[Metadata], *, round_: int, bucket_bytes: int = DEFAULT_BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter in order, each in memory of its own, only after its bytes have been compared.

    After a mismatch nothing more is yielded, but the rest is read, so that the sender does not hang; then it raises.

    Raises:
        CorruptWeightsError: a checksum, the order or the round is wrong.
    """
    buckets = plan_buckets(metadata, bucket_bytes)
    problem = ""
    next_index, current = 0, torch.empty(0)
    for number, (bucket, buffer) in enumerate(zip(buckets, _arrivals(group, buckets), strict=True)):
        size = _size(bucket)
        problem = problem or _difference(buffer, size, number, round_, [metadata[s.index].name for s in bucket])
        if problem:
            continue
        offset = 0
        for segment in bucket:
            if segment.start == 0:
                yield from _empty_parameters(metadata[next_index : segment.index])
                current = torch.empty(metadata[segment.index].shape, dtype=metadata[segment.index].dtype)
                next_index = segment.index + 1
            length = segment.stop - segment.start
            _as_bytes(current)[segment.start : segment.stop].copy_(buffer[offset : offset + length])
            offset += length
            if segment.stop == _num_bytes(metadata[segment.index]):
                yield metadata[segment.index].name, current
    if problem:
        raise CorruptWeightsError(problem)
    yield from _empty_parameters(metadata[next_index:])


def _filled_buckets(
    parameters: Iterable[tuple[str, Tensor]], metadata: Sequence[Metadata], round_: int, bucket_bytes: int
) -> Iterator[Tensor]:
    """Every bucket with its trailer, as bytes. A bucket is valid until the next but one is asked for."""
    buckets = plan_buckets(metadata, bucket_bytes)
    by_parameter: dict[int, list[tuple[int, Segment]]] = {}
    for number, bucket in enumerate(buckets):
        for segment in bucket:
            by_parameter.setdefault(segment.index, []).append((number, segment))
    buffers = _buffers(buckets)
    filled = 0
    for index, tensor in enumerate(_checked(parameters, metadata)):
        source = _as_bytes(tensor.detach().contiguous())
        for number, segment in by_parameter.get(index, []):
            buffer = buffers[number % _NUM_BUFFERS]
            size = segment.stop - segment.start
            buffer[filled : filled + size].copy_(source[segment.start : segment.stop])
            filled += size
            if segment is buckets[number][-1]:
                trailer = torch.tensor([_checksum(buffer[:filled]), number, round_], dtype=torch.int64)
                buffer[filled : filled + _TRAILER_BYTES].copy_(_as_bytes(trailer))
                yield buffer[: filled + _TRAILER_BYTES]
                filled = 0


def _arrivals(group: TransferGroup, buckets: Sequence[Sequence[Segment]]) -> Iterator[Tensor]:
    """Every bucket with its trailer, as bytes, while the next one is on its way; valid until that is asked for."""
    buffers = _buffers(buckets)
    under_way: Transfer | None = None
    for number, bucket in enumerate(buckets):
        if under_way is None:
            under_way = group.start(buffers[0][: _size(bucket) + _TRAILER_BYTES])
        under_way.wait()
        if number + 1 < len(buckets):
            following = buffers[(number + 1) % _NUM_BUFFERS]
            under_way = group.start(following[: _size(buckets[number + 1]) + _TRAILER_BYTES])
        yield buffers[number % _NUM_BUFFERS]


def _difference(buffer: Tensor, size: int, number: int, round_: int, names: Sequence[str]) -> str:
    """What is wrong with a bucket, or an empty string."""
    trailer = buffer[size : size + _TRAILER_BYTES].clone().view(torch.int64).tolist()
    if trailer[1:] != [number, round_]:
        return f"expected bucket {number} of round {round_}, got bucket {trailer[1]} of round {trailer[2]}"
    if trailer[0] != _checksum(buffer[:size]):
        return f"checksum of bucket {number} is wrong: {', '.join(names)} arrived corrupted"
    return ""


def _checksum(data: Tensor) -> int:
    """CRC-32 of the sums of the 4 KiB blocks (as 64-bit words), and of the bytes that are left over.

    A CRC of every byte would take longer than bringing the bytes to another process of the same machine.
    """
    size = data.numel() // _BLOCK_BYTES * _BLOCK_BYTES
    sums = data[:size].view(torch.int64).view(-1, _BLOCK_BYTES // 8).sum(dim=1)
    return zlib.crc32(data[size:].numpy().data, zlib.crc32(sums.numpy().data))


def _checked(parameters: Iterable[tuple[str, Tensor]], metadata: Sequence[Metadata]) -> Iterator[Tensor]:
    """The tensors, each compared with what the receiver was told."""
    for (name, tensor), info in zip(parameters, metadata, strict=True):
        found, told = (name, tensor.dtype, tuple(tensor.shape)), (info.name, info.dtype, tuple(info.shape))
        if found != told:
            raise ValueError(f"the weight source yielded {found} where its metadata says {told}")
        yield tensor


def _empty_parameters(metadata: Sequence[Metadata]) -> Iterator[tuple[str, Tensor]]:
    for info in metadata:
        yield info.name, torch.empty(info.shape, dtype=info.dtype)


def _buffers(buckets: Sequence[Sequence[Segment]]) -> list[Tensor]:
    size = max(map(_size, buckets), default=0) + _TRAILER_BYTES
    return [torch.empty(size, dtype=torch.uint8) for _ in range(min(len(buckets), _NUM_BUFFERS))]


def _size(bucket: Sequence[Segment]) -> int:
    """Bytes of a bucket, without its trailer."""
    return sum(segment.stop - segment.start for segment in bucket)


def _num_bytes(info: Metadata) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes [N]."""
    return tensor.view(-1).view(torch.uint8)


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the network that leads to `host` (the machine's name may resolve to another one)."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return probe.getsockname()[0]


def _absence(store: dist.TCPStore | None, host: str, port: int, world_size: int, timeout_s: float) -> str:
    where = f"the weight transfer at {host}:{port}"
    if store is None:
        return f"nobody answered within {timeout_s:g} s: {where} has no sender, or the network blocks its port"
    missing = [rank for rank in range(world_size) if not store.check([f"joined/{rank}"])]
    return f"ranks {missing} of {world_size} did not join {where} within {timeout_s:g} s (rank 0 is the learner)"
