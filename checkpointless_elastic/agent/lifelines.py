"""Waits for workers' lifelines (`worker.lifeline`): a thread for each, which tells the agent's loop through a pipe."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable

from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.worker import lifeline

__all__ = ["Lifelines"]

_NEWS = struct.Struct("<ii")


class Lifelines:
    """``lost(rank, incarnation)`` is called on the loop's thread when a worker is being killed by a signal.

    What ends in another way, and what has no lifeline, is left to the pidfd.
    """

    def __init__(self, loop: EventLoop, lost: Callable[[int, int], None]) -> None:
        self._loop = loop
        self._lost = lost
        self._read, self._write = os.pipe()  # open for good: a thread may write at any time
        loop.watch(self._read, self._take, first=True)

    def follow(self, path: str, rank: int, incarnation: int, pid: int) -> None:
        """Wait for the end of this worker, whose lifeline is at `path`. Returns at once."""
        arguments = (path, rank, incarnation, pid)
        threading.Thread(target=self._wait, args=arguments, name=f"lifeline-{rank}", daemon=True).start()

    def close(self) -> None:
        """Call nobody any more."""
        self._loop.unwatch(self._read)

    def _wait(self, path: str, rank: int, incarnation: int, pid: int) -> None:
        if lifeline.wait(path) and lifeline.dies_by_signal(pid):
            os.write(self._write, _NEWS.pack(rank, incarnation))

    def _take(self) -> None:
        for rank, incarnation in _NEWS.iter_unpack(os.read(self._read, 64 * _NEWS.size)):
            self._lost(rank, incarnation)
