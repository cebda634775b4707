"""Both ends of the gloo wire in threads of one process, and the senders on top of it."""

import multiprocessing
import os
import threading
import time
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from raylhf.rollout.gloo_stream import (
    CorruptWeightsError,
    ParameterInfo,
    Segment,
    TransferGroup,
    _checksum,
    listen,
    open_group,
    plan_buckets,
    receive_parameters,
    send_parameters,
)
from raylhf.rollout.weight_sender import open_sender

TIMEOUT_S = 20.0
LOCALHOST = "127.0.0.1"


class ListSource:
    """Parameters by name, each yielded in one buffer that the next one overwrites, as a gathering source may do."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def metadata(self):
        return [ParameterInfo(n, t.dtype, tuple(t.shape)) for n, t in self._parameters.items()]

    def __iter__(self):
        for name, tensor in self._parameters.items():
            lent = tensor.clone()
            yield name, lent
            lent.zero_()


def in_thread(function: Callable, *args, **kwargs) -> Callable:
    """Start it; the returned function waits and gives its result or raises its error."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = function(*args, **kwargs)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a thread hangs"
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]

    return result


@pytest.fixture
def pair():
    """A sending and a receiving group."""
    store = listen(timeout_s=TIMEOUT_S)
    arguments = {"world_size": 2, "timeout_s": TIMEOUT_S}
    other = in_thread(open_group, LOCALHOST, store.port, rank=1, **arguments)
    sender = open_group(LOCALHOST, store.port, rank=0, store=store, **arguments)
    receiver = other()
    yield sender, receiver
    sender.close()
    receiver.close()


def parameters_of_many_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(50, 7, generator=generator)  # 1,400 bytes: several buckets of 256
    return {
        "embed.weight": embedding,
        "norm.weight": torch.randn(5, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "transposed": torch.randn(6, 4, generator=generator).t(),
        "lm_head.weight": embedding,  # tied: the same tensor under a second name
        "last_empty": torch.empty(0),
    }


def transfer(
    pair: tuple[TransferGroup, TransferGroup], source: ListSource, *, round_: int = 1, expect: int = 1
) -> dict[str, torch.Tensor]:
    sender, receiver = pair
    metadata = source.metadata()
    sent = in_thread(send_parameters, sender, source, metadata, round_=round_, bucket_bytes=256)
    try:
        return {
            name: tensor.clone()
            for name, tensor in receive_parameters(receiver, metadata, round_=expect, bucket_bytes=256)
        }
    finally:
        sent()


def test_buckets_are_full_but_the_last_and_a_large_parameter_spans_several():
    metadata = [
        ParameterInfo("a", torch.float32, (3,)),
        ParameterInfo("b", torch.bfloat16, (2, 7)),
    ]
    # 12 and 28 bytes in buckets of 16: [a, 4 of b], [16 of b], [8 of b].
    assert plan_buckets(metadata, 16) == [
        [Segment(0, 0, 12), Segment(1, 0, 4)],
        [Segment(1, 4, 20)],
        [Segment(1, 20, 28)],
    ]


def test_every_kind_of_parameter_arrives_equal_to_the_bit(pair):
    parameters = parameters_of_many_kinds()
    received = transfer(pair, ListSource(parameters))
    assert list(received) == list(parameters)
    for name, tensor in parameters.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor), name


def test_a_group_serves_round_after_round(pair):
    for round_ in (1, 2, 3):
        source = ListSource({"w": torch.full((100,), float(round_))})
        assert transfer(pair, source, round_=round_, expect=round_)["w"].eq(round_).all()


def test_several_replicas_receive_the_same_stream():
    store = listen(timeout_s=TIMEOUT_S)
    arguments = {"world_size": 3, "timeout_s": TIMEOUT_S}
    joining = [in_thread(open_group, LOCALHOST, store.port, rank=rank, **arguments) for rank in (1, 2)]
    sender = open_group(LOCALHOST, store.port, rank=0, store=store, **arguments)
    source = ListSource({"w": torch.arange(300), "b": torch.ones(7)})
    receiving = [
        in_thread(lambda group: dict(receive_parameters(group, source.metadata(), round_=1)), joined())
        for joined in joining
    ]
    send_parameters(sender, source, source.metadata(), round_=1)
    for received in receiving:
        assert torch.equal(received()["w"], torch.arange(300))


def test_a_corrupted_bucket_is_noticed_and_its_parameters_are_named(pair, monkeypatch):
    sender, receiver = pair
    calls = []

    def corrupting(buffer: torch.Tensor):
        calls.append(1)
        if len(calls) == 2:
            buffer = buffer.clone()
            buffer[3] ^= 1
        return TransferGroup.start(sender, buffer)

    monkeypatch.setattr(sender, "start", corrupting)
    source = ListSource(
        {"good": torch.ones(64), "bad": torch.ones(32), "worse": torch.ones(8), "after": torch.ones(90)}
    )
    with pytest.raises(CorruptWeightsError, match=r"bucket 1 is wrong: bad, worse, after arrived corrupted"):
        transfer((sender, receiver), source)
    assert len(calls) == 4  # the sender was not left hanging


class Recorder:
    """A group that tells when a transfer begins and is waited for."""

    def __init__(self, group: TransferGroup) -> None:
        self._group = group
        self.events: list[str] = []
        self.num_under_way = 0

    def start(self, buffer: torch.Tensor) -> Any:
        self.events.append("start")
        self.num_under_way += 1
        transfer = self._group.start(buffer)

        def wait() -> None:
            transfer.wait()
            self.num_under_way -= 1
            self.events.append("wait")

        return SimpleNamespace(wait=wait)


class TellingSource(ListSource):
    """Tells when a parameter is asked for, and fails at the third where it is to."""

    def __init__(self, parameters: dict[str, torch.Tensor], events: list[str], *, fails: bool = False) -> None:
        super().__init__(parameters)
        self._events, self._fails = events, fails

    def __iter__(self):
        for number, (name, tensor) in enumerate(super().__iter__()):
            self._events.append("fill")
            if self._fails and number == 2:
                raise LookupError("gathering failed")
            yield name, tensor


def test_a_bucket_is_filled_while_the_one_before_is_on_the_wire(pair):
    sender, receiver = map(Recorder, pair)
    parameters = {str(i): torch.full((64,), float(i)) for i in range(4)}  # a bucket each
    source = TellingSource(parameters, sender.events)
    handed: list[float] = []
    sent = in_thread(send_parameters, sender, source, source.metadata(), round_=1, bucket_bytes=256)
    for _, tensor in receive_parameters(cast(Any, receiver), source.metadata(), round_=1, bucket_bytes=256):
        receiver.events.append("hand on")
        handed.append(float(tensor[0]))
    sent()
    assert sender.events == ["fill", "start"] + ["fill", "wait", "start"] * 3 + ["wait"]
    assert receiver.events == ["start"] + ["wait", "start", "hand on"] * 3 + ["wait", "hand on"]
    assert handed == [0, 1, 2, 3]


def test_nothing_is_left_on_the_wire_when_gathering_fails(pair):
    sender, receiver = Recorder(pair[0]), pair[1]
    source = TellingSource({str(i): torch.ones(64) for i in range(4)}, [], fails=True)
    stream = receive_parameters(receiver, source.metadata(), round_=1, bucket_bytes=256)
    receiving = in_thread(lambda: [next(stream), next(stream)])
    with pytest.raises(LookupError, match="gathering failed"):
        send_parameters(cast(Any, sender), source, source.metadata(), round_=1, bucket_bytes=256)
    assert sender.num_under_way == 0
    assert len(receiving()) == 2


def meet(rank: int, pipe: Any) -> TransferGroup:
    """One of two ranks in processes that share a pipe."""
    store = listen(timeout_s=TIMEOUT_S) if rank == 0 else None
    if store is not None:
        pipe.send(store.port)
    port = store.port if store is not None else pipe.recv()
    return open_group(LOCALHOST, port, rank=rank, world_size=2, timeout_s=TIMEOUT_S, store=store)


def leave_in_the_middle(rank: int, pipe: Any) -> None:
    """As the given rank of a transfer: end without a word after two buckets of eight."""
    group = meet(rank, pipe)
    for _ in range(2):
        group.start(torch.zeros(2**20 + 24, dtype=torch.uint8)).wait()
    os._exit(0)


def send_all(group: TransferGroup, source: ListSource) -> None:
    send_parameters(group, source, source.metadata(), round_=1, bucket_bytes=2**20)


def receive_all(group: TransferGroup, source: ListSource) -> None:
    list(receive_parameters(group, source.metadata(), round_=1, bucket_bytes=2**20))


@pytest.mark.parametrize("lost_rank", [0, 1])
def test_who_loses_the_other_end_in_the_middle_is_told_before_the_deadline(lost_rank):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=leave_in_the_middle, args=(lost_rank, theirs), daemon=True)
    other.start()
    group = meet(1 - lost_rank, ours)
    source = ListSource({"w": torch.zeros(2**21)})
    began = time.monotonic()
    run = receive_all if lost_rank == 0 else send_all
    with pytest.raises(RuntimeError) as raised:
        run(group, source)
    assert not isinstance(raised.value, CorruptWeightsError)
    assert time.monotonic() - began < TIMEOUT_S / 2
    group.close()
    other.join(TIMEOUT_S)


def test_the_checksum_tells_blocks_that_changed_places_and_single_bits():
    data = torch.randint(0, 256, (3 * 4096 + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    swapped = torch.cat([data[4096:8192], data[:4096], data[8192:]])
    different = {_checksum(data), _checksum(swapped)}
    for place in (0, 5000, 3 * 4096 + 4):
        changed = data.clone()
        changed[place] ^= 128
        different.add(_checksum(changed))
    assert len(different) == 5
    assert _checksum(data[:5]) == zlib.crc32(bytes(data[:5].tolist()))  # less than a block: a plain CRC-32


def test_a_receiver_that_missed_a_round_notices(pair):
    with pytest.raises(CorruptWeightsError, match="expected bucket 0 of round 2, got bucket 0 of round 1"):
        transfer(pair, ListSource({"w": torch.ones(4)}), round_=1, expect=2)


def test_a_source_that_contradicts_its_metadata_is_refused_before_its_bytes_are_sent(pair):
    source = ListSource({"w": torch.ones(4)})
    wrong = [ParameterInfo("w", torch.float32, (2, 2))]
    with pytest.raises(ValueError, match="weight source yielded"):
        send_parameters(pair[0], source, wrong, round_=1)


def test_who_is_missing_is_named_at_the_deadline():
    store = listen(timeout_s=1.0)
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 did not join"):
        open_group(LOCALHOST, store.port, rank=0, world_size=3, timeout_s=0.5, store=store)


def test_the_gloo_sender_sends_what_its_update_info_says():
    parameters = parameters_of_many_kinds()
    sender = open_sender(
        "gloo", source=ListSource(parameters), rank=0, world_size_of_rollout=1, host=LOCALHOST, timeout_s=TIMEOUT_S
    )
    init = sender.prepare()
    assert init["rank_offset"] == 1
    receiver = in_thread(open_group, init["host"], init["port"], rank=1, world_size=init["world_size"], timeout_s=20.0)
    sender.connect()
    for _ in range(2):
        info = sender.update_info()
        metadata = [
            ParameterInfo(n, getattr(torch, d), tuple(s))
            for n, d, s in zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        ]
        sent = in_thread(sender.send)
        received = dict(
            receive_parameters(receiver(), metadata, round_=info["round"], bucket_bytes=init["bucket_bytes"])
        )
        sent()
        assert all(torch.equal(received[name], tensor) for name, tensor in parameters.items())
    sender.release()
    sender.close()
    receiver().close()


def test_other_learner_ranks_only_gather():
    source = ListSource({"w": torch.ones(4)})
    sender = open_sender("gloo", source=source, rank=1, world_size_of_rollout=1, host=LOCALHOST, timeout_s=1.0)
    assert sender.prepare() == {} and sender.update_info() == {}
    sender.connect()
    sender.send()
    sender.close()


def test_an_unknown_transport_is_refused_by_name():
    with pytest.raises(ValueError, match="rollout.weight_transfer is 'tcp'"):
        open_sender("tcp", source=ListSource({}), rank=0, world_size_of_rollout=1, host=LOCALHOST, timeout_s=1.0)


def test_the_nccl_senders_meeting_point_is_what_vllms_engine_asks_for():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

    source = ListSource({"w": torch.ones(4, dtype=torch.bfloat16)})
    arguments = {"source": source, "world_size_of_rollout": 3, "host": LOCALHOST, "timeout_s": 1.0}
    sender = open_sender("nccl", rank=0, **arguments)
    init = NCCLWeightTransferInitInfo(**sender.prepare())
    assert (init.world_size, init.rank_offset, init.packed) == (4, 1, True)
    assert init.master_port
    assert NCCLWeightTransferUpdateInfo(**sender.update_info()).dtype_names == ["bfloat16"]
    sender.close()
    gatherer = open_sender("nccl", rank=1, **arguments)
    assert gatherer.prepare() == {}
    gatherer.send()
