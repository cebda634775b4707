"""What happens to an engine's processes when the process that owns them is killed."""

import subprocess
import sys

import psutil

from raylhf.models.tiny import write_tiny_model

OWNER = """
import asyncio, sys
from raylhf.config import RunConfig
from raylhf.rollout.worker import RolloutWorker

async def main():
    config = RunConfig.model_validate({
        "name": "killed", "num_steps": 1, "model": {"path": "tiny"}, "data": {"path": "unused"},
        "rollout": {"prompts_per_step": 1, "threads": 1, "kv_cache_gib": 0.125},
        "reward": {"graph": {"kind": "characters", "characters": "a"}},
    })
    worker = RolloutWorker(config, sys.argv[1], replica=0)
    started = await worker.start()
    print("children", *(pid for pid, _ in started["children"]), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_sigkill_of_the_worker_takes_the_engine_with_it(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    command = [sys.executable, "-c", OWNER, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            line = next(line for line in owner.stdout if line.startswith("children"))
            engine = psutil.Process(owner.pid).children(recursive=True)
            assert {int(pid) for pid in line.split()[1:]} <= {process.pid for process in engine}
            assert line.strip() != "children"
        finally:
            owner.kill()
    _, alive = psutil.wait_procs(engine, timeout=10)
    try:
        assert not alive
    finally:
        for process in alive:
            process.kill()
