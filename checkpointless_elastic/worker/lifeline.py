"""Tells the agent of a worker's death before the kernel has taken the dead process apart.

A process that is killed gives its memory back first, tens of milliseconds for some hundred MiB, and longer when the
cores are busy; only then does its pidfd become readable. A robust mutex (pthread_mutexattr_setrobust(3)) that its main
thread holds is given up before that. So a worker holds one in shared memory, and a thread of the agent waits for it.
The pidfd stays the last word: where there are no robust mutexes, it is the only one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

from checkpointless_elastic.process_stat import EXIT_CODE, FLAGS, stat_fields

__all__ = ["dies_by_signal", "hold", "let_go", "wait"]

_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST
_ATTRIBUTES, _MUTEX = 64, 128  # bytes; larger than glibc's types are on any processor
_PF_EXITING = 0x4

_libc = ctypes.CDLL(None)
_held: mmap.mmap | None = None


def hold(path: str) -> None:
    """Make this worker's lifeline, held by its main thread, which must be the caller; nothing where it cannot be."""
    global _held
    if not hasattr(_libc, "pthread_mutexattr_setrobust"):
        return
    partial = Path(f"{path}.partial")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        _held = mmap.mmap(descriptor, mmap.PAGESIZE)
    finally:
        os.close(descriptor)
    attributes = ctypes.create_string_buffer(_ATTRIBUTES)
    mutex = _mutex(_held)
    _libc.pthread_mutexattr_init(attributes)
    _libc.pthread_mutexattr_setpshared(attributes, _SHARED)
    _libc.pthread_mutexattr_setrobust(attributes, _ROBUST)
    _libc.pthread_mutex_init(mutex, attributes)
    _libc.pthread_mutex_lock(mutex)
    partial.rename(path)


def let_go() -> None:
    """Give the lifeline up while this worker lives; its agent stops waiting for it. By the thread that holds it."""
    global _held
    if _held is not None:
        _libc.pthread_mutex_unlock(
            _mutex(_held)
        )  # also takes it off the thread's list, which the kernel reads
    _held = None


def wait(path: str) -> bool:
    """Block until the holder's main thread has ended; False at once if there is no lifeline, or nobody holds it."""
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    except FileNotFoundError:
        return False
    os.unlink(path)
    return bool(_libc.pthread_mutex_lock(_mutex(memory)) == errno.EOWNERDEAD)


def dies_by_signal(pid: int) -> bool:
    """Whether a process is on its way out because of a signal. False if it is not known, or gone."""
    try:
        fields = stat_fields(pid)
        return bool(int(fields[FLAGS]) & _PF_EXITING and int(fields[EXIT_CODE]) & 0x7F)
    except (OSError, IndexError, ValueError):
        return False


def _mutex(memory: mmap.mmap) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * _MUTEX).from_buffer(memory)
