"""A thread for calls that may never come back.

Found by running torch 2.13: against a server that is stopped (SIGSTOP) or cut off, TCPStore's `get`, `check`,
`compare_set`, the end of a `wait` and the connecting itself block for good, whatever the store's timeout, and `set`
succeeds without an answer. Nothing wakes them before the connection breaks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

__all__ = ["BoundedCaller"]

T = TypeVar("T")


class BoundedCaller:
    """Runs calls one after the other on its own daemon thread. One that is stuck holds up later ones, no caller."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, work: Callable[[], T], limit: float) -> T:
        """What `work` returns or raises; TimeoutError after `limit` seconds, and then it is not begun later."""
        future = self.submit(work)
        if not wait([future], limit).done:
            future.cancel()
            raise TimeoutError(f"no answer within {limit:g} s")
        return future.result()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """The same without waiting."""
        future: Future[T] = Future()
        self._calls.put((future, work))
        return future

    def close(self) -> None:
        """The thread ends when the calls before this one have come back."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, work  # nothing keeps a store alive that its owner has closed
