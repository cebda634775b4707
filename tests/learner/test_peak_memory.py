"""The peak that a rank reports on a CPU."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raylhf.learner.engine import forget_peak_memory, peak_memory_gib

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the mark is reset by way of Linux's /proc")
@pytest.mark.usefixtures("group")
def test_it_is_the_most_since_it_was_forgotten_not_what_is_held_now():
    forget_peak_memory(CPU)
    before = peak_memory_gib(CPU)
    block = np.ones(256 * MIB, dtype=np.uint8)  # above glibc's heap: given back at once
    del block
    after = peak_memory_gib(CPU)
    assert after - before == pytest.approx(0.25, abs=0.05)
    forget_peak_memory(CPU)
    assert peak_memory_gib(CPU) < after - 0.2
