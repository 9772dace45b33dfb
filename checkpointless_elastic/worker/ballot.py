"""Votes in memory, for a job whose ranks are all on one node: who votes last sees that all have, and nobody is asked.

Each rank has a cell: the step at which it is, and one more once it has voted for that step here. While the ballot is
open, a step is committed once all cells are above it, whoever sees it first. A rank that is frozen does not look any
more: the agent, which has the answers of all survivors before it decides, reads the cells and tells them. What a lost
rank left there counts.

The agent opens the ballot with the first commit of a generation, for which each rank has voted by a message and set its
cell, and closes it before it passes a decision on: all ranks that live are frozen then. In a job that may get more
nodes it stays closed.

Ranks wait on the *bell*, a futex(2): whoever has news for them changes that word and wakes those that sleep. A wake-up
can be missed, if two ring at once, or if the votes of two ranks are not yet seen by each other, which the lock that a
rank lets go of between `cast` and `wait` all but excludes; LOOK_S bounds what that costs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

__all__ = ["LOOK_S", "Ballot", "ballot_path"]

LOOK_S = 0.05
"""How long a rank sleeps at most before it looks again."""
_LIMIT, _BELL, _CELLS = range(3)  # in words; of the bell's word the first 4 bytes are used
_WORD = 8
_WAIT, _WAKE = 0, 1
_ALL = 2**31 - 1
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, 0)
_syscall = ctypes.CDLL(None).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
]


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_LOOK = _Timespec(0, int(LOOK_S * 1e9))
_LOOK_AT = ctypes.addressof(_LOOK)


def ballot_path(run_dir: str) -> str:
    """Where the ballot of this node's ranks is."""
    return os.path.join(run_dir, "ballot")


class Ballot:
    """Of one run of the script. But for the bell, each word is written by one process.

    ``descriptor``: of the file; it is closed. ``rank``: of this process; -1 in the agent.
    """

    def __init__(self, descriptor: int, rank: int = -1) -> None:
        self._rank = rank
        try:
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
        self._words = memoryview(memory).cast("q")
        self._cells = self._words[_CELLS:]
        self._bell = self._words[_BELL : _BELL + 1].cast("B").cast("I")[:1]
        self._bell_at = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + _BELL * _WORD

    @classmethod
    def create(cls, path: str, ranks: int) -> Ballot:
        """A closed one for this number of ranks; there must be none at this path."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(
                descriptor, 0, _WORD * (_CELLS + ranks)
            )  # OSError now, and no SIGBUS at a store
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @classmethod
    def open(cls, path: str, rank: int) -> Ballot:
        """The one at this path, for a rank."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), rank)

    # ---- a rank

    def cast(self, step: int) -> bool:
        """Vote for this step. False: it is decided by messages, and the vote has to be sent."""
        counts = step < self._words[_LIMIT]
        self._cells[self._rank] = step + counts
        return counts

    def wait(self, step: int, given_up: Callable[[], bool]) -> bool:
        """Wait until all have voted for this step: True. False when it was given up before."""
        last = True
        while True:
            bell = self._bell[0]  # before the look: what rings after it ends the sleep
            if min(self._cells) > step:
                break
            if given_up():
                return False
            last = False
            _syscall(_FUTEX, self._bell_at, _WAIT, bell, _LOOK_AT, None, 0)
        if last:
            self.ring()
        return True

    def ring(self) -> None:
        """There may be news for ranks that wait."""
        if not _FUTEX:
            return  # it is never open
        self._bell[0] = (self._bell[0] + 1) % 2**32
        _syscall(_FUTEX, self._bell_at, _WAKE, _ALL, None, None, 0)

    # ---- the agent

    def begin(self, limit: int) -> None:
        """Steps below ``limit`` are committed so from now on, if this machine has a futex that is known here."""
        if _FUTEX:
            self._words[_LIMIT] = limit

    def end(self) -> None:
        """All ranks that live are frozen."""
        self._words[_LIMIT] = 0

    def committed(self) -> int:
        """Steps for which all ranks have voted; 0 while the ballot is closed."""
        return min(self._cells) if self._words[_LIMIT] else 0
