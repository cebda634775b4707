"""No process of an engine outlives the process that owns the engine, not even after SIGKILL."""

import multiprocessing
import os
import signal
import threading
import time

import psutil

OWNER_VARIABLE = "RAYLHF_ENGINE_OWNER"
_POLL_S = 1.0
_TRACKER = "multiprocessing.resource_tracker"


def own_future_children() -> None:
    """Make this process the owner of the engine processes that it will start."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())


def guard_against_orphanhood() -> None:
    """In an engine process, start a thread that kills it when its owner is gone.

    A thread that asks, not PR_SET_PDEATHSIG: that signal comes when the parent's *thread* that started the child ends.
    """
    owner_pid = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner_pid and owner_pid != os.getpid() and multiprocessing.parent_process() is not None:
        threading.Thread(target=_die_with, args=(owner_pid,), daemon=True, name="orphan-guard").start()


def descendants(of_pid: int | None = None) -> list[psutil.Process]:
    """Child processes and theirs, without multiprocessing's resource trackers (each ends with its owner)."""
    try:
        children = psutil.Process(of_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if not _is_tracker(child)]


def kill_survivors(processes: list[psutil.Process], *, patience_s: float) -> None:
    """Wait for the processes to end by themselves; kill those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    psutil.wait_procs(alive, timeout=patience_s)


def _die_with(owner_pid: int) -> None:
    try:
        owner = psutil.Process(owner_pid)
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any(_TRACKER in part for part in process.cmdline())
    except psutil.Error:  # it is ending
        return False
