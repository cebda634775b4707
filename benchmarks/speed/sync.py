"""Weight sync of a SmolLM2-135M-sized policy between two processes, against the limits of memory and loopback.

    python benchmarks/speed/sync.py --output runs/sync.json

On the wire: a sender with the learner's weight source and a receiver that keeps nothing, in alternating rounds: as it
was before (buckets of 64 MiB one after the other, a CRC of every byte), with today's buckets and checksum but one after
the other, and with gathering and handing on beside the transfer. Its limits: the same bytes as a memory copy, over a
bare TCP connection and as bare gloo broadcasts. With an engine: syncs of a real vLLM engine, all weights and adapters
alone.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylhf.rollout import gloo_stream
from raylhf.rollout.gloo_stream import DEFAULT_BUCKET_BYTES, Transfer, TransferGroup, listen, open_group

LOCALHOST = "127.0.0.1"
TIMEOUT_S = 120.0
LORA_RANK = 16
KINDS = {"before": 64 * 2**20, "serial": DEFAULT_BUCKET_BYTES, "overlapped": DEFAULT_BUCKET_BYTES}
"""Bytes of a bucket."""
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


@contextmanager
def as_of(kind: str) -> Iterator[None]:
    """Within it, checksums are those of the given kind of sync."""
    today = gloo_stream._checksum
    if kind == "before":
        gloo_stream._checksum = lambda data: zlib.crc32(data.numpy().data)
    try:
        yield
    finally:
        gloo_stream._checksum = today


class OneAtATime:
    """A group without overlap: the sender waits at once, the receiver begins when it must wait anyway."""

    def __init__(self, group: TransferGroup) -> None:
        self._group = group

    def start(self, buffer: Tensor) -> Transfer:
        if self._group.rank == 0:
            transfer = self._group.start(buffer)
            transfer.wait()
            return transfer
        return _Later(lambda: self._group.start(buffer).wait())


class _Later:
    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run

    def wait(self) -> object:
        run, self._run = self._run, lambda: None
        return run()


def measure(*, rounds: int = 7, with_engine: bool = True) -> dict[str, Any]:
    """Medians and ranges over `rounds`; GB/s are 1e9 bytes of weights a second."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        sender = context.Process(target=_serve, args=(theirs, folder), daemon=True)
        sender.start()
        try:
            sizes = _ask(ours, "sizes")
            found: dict[str, Any] = {
                "model": "SmolLM2-135M, float32",
                "lora_rank": LORA_RANK,
                "sync_bytes": sizes,
                "adapters_share": round(sizes["adapters"] / sizes["merged"], 4),
                "wire": on_the_wire(ours, sizes["full"], rounds=rounds),
            }
            if with_engine:
                found["engine"] = asyncio.run(into_an_engine(ours, folder, rounds=rounds))
            return found
        finally:
            ours.send(("end", ()))
            sender.join(10)
            sender.kill()


def on_the_wire(pipe: Any, num_bytes: int, *, rounds: int) -> dict[str, Any]:
    """GB/s of each way to bring the weights' bytes to another process, and of a copy within one."""
    group = open_group(LOCALHOST, _ask(pipe, "listen"), rank=1, world_size=2, timeout_s=TIMEOUT_S)
    port = _ask(pipe, "listen_tcp")
    with socket.create_connection((LOCALHOST, port)) as connection:
        source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
        ways: dict[str, Callable[[], object]] = {
            "memory_copy": lambda: target.copy_(source),
            "tcp": lambda: _receive_tcp(pipe, connection, num_bytes),
            "gloo": lambda: _receive_gloo(pipe, group, num_bytes),
        }
        for name in ("full", "merged"):
            for kind in KINDS:
                ways[f"{name}_{kind}"] = partial(_receive, pipe, group, name, kind)
        seconds = _alternating(ways, rounds)
    group.close()
    return {name: _spread([num_bytes / s / 1e9 for s in times], "gb_per_s") for name, times in seconds.items()}


async def into_an_engine(pipe: Any, folder: str, *, rounds: int) -> dict[str, Any]:
    """Seconds that a vLLM engine with a copy of the model takes for a sync, from the call to the version read back."""
    from raylhf.rollout.worker import RolloutWorker

    worker = RolloutWorker(_config(folder), folder, replica=0)
    await worker.start()
    seconds: dict[str, list[float]] = {"merged": [], "adapters": []}
    version = 0
    try:
        for number in range(rounds + 1):
            for source in seconds:
                init_info = await _ask_async(pipe, "open_sender", source)
                await asyncio.gather(worker.join_transfer(init_info, place=0), _ask_async(pipe, "connect_sender"))
                version += 1
                began = time.perf_counter()
                update_info = await _ask_async(pipe, "update_info")
                update = worker.update_weights(update_info, policy_version=version)
                await asyncio.gather(update, _ask_async(pipe, "send"))
                if number > 0:  # the first ones warm up
                    seconds[source].append(time.perf_counter() - began)
    finally:
        await worker.close()
    return {source: _spread(times, "s") for source, times in seconds.items()}


def _config(folder: str) -> Any:
    from raylhf.config import RunConfig

    return RunConfig.model_validate({
        "name": "sync",
        "num_steps": 1,
        "model": {"path": folder},
        "data": {"path": "unused"},
        "rollout": {"prompts_per_step": 1, "threads": 1, "kv_cache_gib": 0.125},
        "reward": {"graph": {"kind": "format"}},
    })  # fmt: skip


def _alternating(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, `rounds` times in turns after a first time that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _spread(values: list[float], unit: str) -> dict[str, float]:
    kinds = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {f"{kind}_{unit}": round(value, 3) for kind, value in kinds.items()}


# --- receiving ------------------------------------------------------------------------------------------------------


def _receive_tcp(pipe: Any, connection: socket.socket, num_bytes: int) -> None:
    buffer = memoryview(bytearray(DEFAULT_BUCKET_BYTES))
    pipe.send(("send_tcp", (num_bytes,)))
    left = num_bytes
    while left:
        left -= connection.recv_into(buffer, min(left, len(buffer)))
    _answer(pipe)


def _receive_gloo(pipe: Any, group: TransferGroup, num_bytes: int) -> None:
    buffer = torch.zeros(DEFAULT_BUCKET_BYTES, dtype=torch.uint8)
    pipe.send(("send_gloo", (num_bytes,)))
    for size in _bucket_sizes(num_bytes):
        group.start(buffer[:size]).wait()
    _answer(pipe)


def _receive(pipe: Any, group: TransferGroup, name: str, kind: str) -> None:
    pipe.send(("send_source", (name, kind)))
    metadata = pipe.recv()
    with as_of(kind):
        for _ in gloo_stream.receive_parameters(_group_of(kind, group), metadata, round_=1, bucket_bytes=KINDS[kind]):
            pass
    _answer(pipe)


def _group_of(kind: str, group: TransferGroup) -> Any:
    return group if kind == "overlapped" else OneAtATime(group)


def _bucket_sizes(num_bytes: int) -> list[int]:
    return [min(DEFAULT_BUCKET_BYTES, num_bytes - start) for start in range(0, num_bytes, DEFAULT_BUCKET_BYTES)]


def _ask(pipe: Any, name: str, *args: Any) -> Any:
    pipe.send((name, args))
    return _answer(pipe)


async def _ask_async(pipe: Any, name: str, *args: Any) -> Any:
    return await asyncio.to_thread(_ask, pipe, name, *args)


def _answer(pipe: Any) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError("the sender does not answer")
    return pipe.recv()


# --- sending --------------------------------------------------------------------------------------------------------


class _Sender:
    """The learner's side, in a process of its own: each method is a command."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        from raylhf.learner.weight_source import AdapterWeights, PolicyWeights
        from raylhf.models.adapters import add_lora, lora_layers
        from raylhf.models.tiny import byte_tokenizer

        torch.set_num_threads(1)
        plain: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M))
        plain.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        adapted: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        add_lora(adapted, rank=LORA_RANK, alpha=2 * LORA_RANK, target_modules="all-linear", seed=0)
        layers: dict[str, Any] = lora_layers(adapted)
        for layer in layers.values():
            layer.lora_B["raylhf"].weight.data.normal_(std=0.01)
        self._sources: dict[str, Any] = {
            "full": PolicyWeights(plain),
            "merged": PolicyWeights(adapted),
            "adapters": AdapterWeights(adapted),
        }
        self._group: Any = None
        self._connection: Any = None
        self._sender: Any = None

    def sizes(self) -> dict[str, int]:
        return {name: source.num_bytes for name, source in self._sources.items()}

    def listen(self) -> int:
        store = listen(timeout_s=TIMEOUT_S)

        def join() -> None:
            self._group = open_group(LOCALHOST, store.port, rank=0, world_size=2, timeout_s=TIMEOUT_S, store=store)

        threading.Thread(target=join, daemon=True).start()
        return store.port

    def listen_tcp(self) -> int:
        server = socket.create_server((LOCALHOST, 0))

        def accept() -> None:
            self._connection = server.accept()[0]

        threading.Thread(target=accept, daemon=True).start()
        return server.getsockname()[1]

    def send_tcp(self, num_bytes: int) -> None:
        data = torch.ones(DEFAULT_BUCKET_BYTES, dtype=torch.uint8).numpy().data
        for size in _bucket_sizes(num_bytes):
            self._connection.sendall(data[:size])

    def send_gloo(self, num_bytes: int) -> None:
        data = torch.ones(DEFAULT_BUCKET_BYTES, dtype=torch.uint8)
        for size in _bucket_sizes(num_bytes):
            self._group.start(data[:size]).wait()

    def send_source(self, pipe: Any, name: str, kind: str) -> None:
        source = self._sources[name]
        metadata = source.metadata()
        pipe.send(metadata)
        with as_of(kind):
            group = _group_of(kind, self._group)
            gloo_stream.send_parameters(group, source, metadata, round_=1, bucket_bytes=KINDS[kind])

    def open_sender(self, name: str) -> dict[str, Any]:
        from raylhf.rollout.weight_sender import open_sender

        if self._sender is not None:
            self._sender.close()
        self._sender = open_sender(
            "gloo", source=self._sources[name], rank=0, world_size_of_rollout=1, host=LOCALHOST, timeout_s=TIMEOUT_S
        )
        return self._sender.prepare()

    def connect_sender(self) -> None:
        self._sender.connect()

    def update_info(self) -> dict[str, Any]:
        return self._sender.update_info()

    def send(self) -> None:
        self._sender.send()


def _serve(pipe: Any, folder: str) -> None:
    sender = _Sender(folder)
    while True:
        name, args = pipe.recv()
        if name == "end":
            return
        with_pipe = (pipe,) if name == "send_source" else ()
        pipe.send(getattr(sender, name)(*with_pipe, *args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/sync.json"), help="file of the results")
    parser.add_argument("--rounds", type=int, default=7, help="of each way")
    parser.add_argument("--no-engine", action="store_true", help="only what goes over the wire")
    arguments = parser.parse_args()
    found = measure(rounds=arguments.rounds, with_engine=not arguments.no_engine)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
