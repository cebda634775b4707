"""One process for each training run: DeepSpeed holds on to a process group for good."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def each_in_a_process(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """`function` of every task, in order, one at a time; the processes are forked after the heavy imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["closed_form.methods"])
    with patch.dict(os.environ, ENVIRONMENT), ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield from pool.map(function, tasks)
