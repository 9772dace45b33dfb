"""How a thread of an agent has something done on the agent's loop."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable

from checkpointless_elastic.agent.runtime import EventLoop

__all__ = ["Bell"]


class Bell:
    """Calls come in the order in which they were asked for, from whatever thread."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._event, self._deliver)

    def ring(self, call: Callable[[], None]) -> None:
        """Have this called on the loop. Any thread; never blocks."""
        self._calls.put(call)
        os.eventfd_write(self._event, 1)

    def aside(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have work done on a thread of its own, then this called on the loop; what the work raises comes there."""
        threading.Thread(
            target=self._aside, args=(work, then), name="checkpointless-aside", daemon=True
        ).start()

    def _aside(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            then = functools.partial(_raise, error)
        self.ring(then)

    def close(self) -> None:
        """On the loop: nothing is called from now on. The descriptor stays open, since threads may still ring."""
        self._loop.unwatch(self._event)

    def _deliver(self) -> None:
        os.eventfd_read(self._event)
        while not self._calls.empty():
            self._calls.get()()


def _raise(error: BaseException) -> None:
    raise error
