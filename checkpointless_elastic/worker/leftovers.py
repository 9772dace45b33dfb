"""What a script leaves behind that would be in the way of its next run: child processes, threads, memory, groups."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch

from checkpointless_elastic.process_stat import GROUP, STATE, stat_fields
from checkpointless_elastic.worker.purge import is_library

__all__ = ["Memory", "end_children", "strays"]

PATIENCE_S = 1.0
"""How long threads of the script may take to end once its objects are gone."""
SLACK = 64 << 20
PART = 10
"""Kept memory that is tolerated: a tenth of what the run had used, and always 64 MiB."""
_END_LIMIT_S = 1.0


# ---- processes


def end_children() -> None:
    """Kill every process that the script has started, as the end of its worker would. Blocks until they are gone."""
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    spared = getattr(getattr(tracker, "_resource_tracker", None), "_pid", None)
    killed = [pid for pid in list(_group()) if pid != spared and _kill(pid)]
    for child in [*getattr(sys.modules.get("multiprocessing.process"), "_children", ())]:
        child.join(_END_LIMIT_S)
    for pid in killed:
        with contextlib.suppress(ChildProcessError):  # a child's child, or waited for
            os.waitpid(pid, 0)
    if spared:  # it removes what the dead have left in shared memory
        tracker._resource_tracker._stop()  # type: ignore[union-attr]


def _group() -> Iterator[int]:
    """The other processes of this worker's process group, which it leads."""
    own = os.getpid()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != own:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = stat_fields(int(name))
                if int(fields[GROUP]) == own and fields[STATE] != "Z":
                    yield int(name)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# ---- threads


def strays(before: set[threading.Thread]) -> str:
    """Names of the threads that would go on with the script's code, after a moment to end; empty if there are none.

    Daemon threads of libraries are not counted: they wait for work, and serve the next run as they did this one.
    """
    deadline = time.monotonic() + PATIENCE_S
    new = [thread for thread in threading.enumerate() if thread not in before]
    for thread in new:
        with contextlib.suppress(RuntimeError):  # another thread is about to start it
            thread.join(max(0.0, deadline - time.monotonic()) if _counts(thread) else 0.0)
    return ", ".join(sorted(thread.name for thread in new if _goes_on(thread)))


def _goes_on(thread: threading.Thread) -> bool:
    return (thread.is_alive() or thread.ident is None) and _counts(thread)


def _counts(thread: threading.Thread) -> bool:
    if thread.name.startswith("checkpointless-"):
        return False
    if not thread.daemon:
        return True
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


# ---- memory


class Memory:
    """Levels of the memory of tensors, in bytes, by device. Made before the first run."""

    def __init__(self) -> None:
        self._before = _level()

    def kept(self) -> str:
        """How much the run has not given back, if that is too much to go on; else empty."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        for device, level in _level().items():
            kept = level - self._before.get(device, 0)
            if kept > max(SLACK, _peak(device) // PART):
                return f"{kept >> 20} MiB of tensors on {device} were not given back"
        return ""


def _level() -> dict[str, int]:
    levels = {"cpu": _in_tensors()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            levels[f"cuda:{device}"] = torch.cuda.memory_allocated(device)
    return levels


def _peak(device: str) -> int:
    """On a CPU nobody counts what tensors have had."""
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _in_tensors() -> int:
    """Bytes of the living tensors on CPUs; what was made before the fork is not among the objects looked at."""
    kinds: dict[type, bool] = {}
    sizes: dict[int, int] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, torch.Tensor)
        if kinds[kind] and one.device.type == "cpu" and one.layout is torch.strided:
            try:
                storage = one.untyped_storage()
            except (NotImplementedError, RuntimeError):  # a wrapper, whose parts are tensors too
                continue
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
