"""What a device can do at most, and the share of it that work is assumed to reach."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Device:
    """One GPU, or one thread of a CPU; rates are per second."""

    name: str
    flops: float
    """Dense matrix products in the type that the model is stored in: bfloat16 on a GPU, float32 on a CPU."""
    float32_flops: float
    """The same in float32."""
    memory_bytes: float
    """Read from memory."""
    link_bytes: float
    """Sent, one way, to another device of the node."""
    network_bytes: float
    """Sent, one way, to another node."""
    learn_share: float
    """Of `flops`, in forward and backward passes of the learner (MFU)."""
    prefill_share: float
    """Of `flops`, when an engine reads prompts."""
    decode_share: float
    """Of `flops`, when an engine decodes so many sequences that arithmetic is the limit."""
    read_share: float
    """Of `memory_bytes`, when an engine reads weights and KV cache to decode."""
    send_share: float
    """Of `link_bytes` and `network_bytes`, in collectives and weight sync."""
    source: str
    """Where the rates, and the shares, come from."""


_GPU_SHARES = {
    "learn_share": 0.4,
    "prefill_share": 0.5,
    "decode_share": 0.5,
    "read_share": 0.7,
    "send_share": 0.7,
}
_GPU_SOURCE = "NVIDIA's data sheet of the SXM board, dense; shares assumed (Llama 3 reports 38 to 43 % MFU, 2407.21783)"

DEVICES = {
    "h100": Device("H100 SXM", 989e12, 67e12, 3.35e12, 450e9, 50e9, **_GPU_SHARES, source=_GPU_SOURCE),
    "h200": Device("H200 SXM", 989e12, 67e12, 4.8e12, 450e9, 50e9, **_GPU_SHARES, source=_GPU_SOURCE),
    "a100": Device("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12, 300e9, 25e9, **_GPU_SHARES, source=_GPU_SOURCE),
    "cpu": Device(
        "CPU thread",
        140e9,
        140e9,
        8e9,
        1e9,
        1e9,
        learn_share=0.6,
        prefill_share=0.4,
        decode_share=0.1,
        read_share=0.5,
        send_share=0.3,
        source="a core of a shared server; shares from runs of SmolLM2-135M on it (docs/planning.md)",
    ),
}
"""By the name that `raylhf plan --device` takes."""
NAME_OF_GPU = "h100"
"""What a GPU is taken for where nothing is said."""


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products in bfloat16 (x86 and ARM)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


def measure_cpu() -> Device:
    """The CPU's entry with this machine's rates: a float32 product and a sum, about a quarter of a second on as many
    threads as NumPy takes, so set OMP_NUM_THREADS=1 for one thread's."""
    import numpy as np

    size = 768
    matrix = np.ones((size, size), dtype=np.float32)
    _seconds_of(matrix, 1)  # the first product starts the threads
    flops = 2 * size**3 * 12 / _seconds_of(matrix, 12)
    vector = np.ones(2**25, dtype=np.float32)
    start = time.perf_counter()
    vector.sum()
    bytes_per_s = vector.nbytes / (time.perf_counter() - start)
    name = "CPU thread of this machine"
    return replace(DEVICES["cpu"], name=name, flops=flops, float32_flops=flops, memory_bytes=bytes_per_s)


def _seconds_of(matrix: Any, products: int) -> float:
    start = time.perf_counter()
    for _ in range(products):
        _ = matrix @ matrix
    return time.perf_counter() - start
