"""Waiting for gloo works that may never end.

A gloo pair whose connection fails tells all waiting operations but those whose data stands in its transmit queue: such
a send waits for the group's whole time limit, half an hour by default (read in gloo's transport/tcp/pair.cc,
`signalException` and `sendAsyncMode`, 2026). So a wait looks up from time to time whether its group has become void,
and DDP's reducer, which waits in C++, is given a future that an abort can complete.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import torch

__all__ = ["AbortableFuture", "wait_in_slices"]

_SLICE = timedelta(milliseconds=200)
GRACE_S = 0.02
"""How long a void group's works are given to end by themselves."""


def wait_in_slices(native: Any, link: Any, timeout: timedelta) -> bool:
    """`native.wait(timeout)` (zero: no limit), but ends with a RuntimeError soon after the group has become void."""
    deadline = time.monotonic() + timeout.total_seconds() if timeout else None
    while True:
        try:
            done: bool = native.wait(_SLICE)
            return done
        except RuntimeError:
            over = deadline is not None and time.monotonic() >= deadline
            if native.is_completed() or link.void or over:
                raise


class AbortableFuture:
    """A future of the outputs that ends with the native one, or with the outputs as they are when the group is void.

    Attributes:
        future: what is handed out. DDP's reducer takes the list of tensors out of it.
    """

    def __init__(self, native: Any, outputs: list[torch.Tensor], link: Any) -> None:
        self._outputs = outputs
        self._link = link
        self._lock = threading.Lock()
        self._done = False
        self._error: Exception | None = None
        self._trigger: torch.futures.Future[None] = torch.futures.Future()
        # An exception that is set on a Python future is copied by C++ callers without the interpreter's lock, which
        # ends the process. One that a callback raises reaches them as a C++ error.
        self.future: torch.futures.Future[list[torch.Tensor]] = self._trigger.then(self._outcome)
        link.futures.add(self)
        native.add_done_callback(self._ended)
        if (
            link.void
        ):  # an abort on another thread may have looked at `link.futures` before this one was there
            give_up_soon([self])

    def _outcome(self, _trigger: Any) -> list[torch.Tensor]:
        if self._error is not None:
            raise RuntimeError(str(self._error))
        return self._outputs

    def _ended(self, native: Any) -> None:
        """On a thread of gloo, or at once."""
        try:
            native.value()
        except Exception as error:
            self._complete(None if self._link.void else error)
        else:
            self._complete(None)

    def give_up(self) -> None:
        """Complete it with the outputs as they are, unless it has ended. Any thread."""
        self._complete(None)

    def _complete(self, error: Exception | None) -> None:
        with self._lock:
            if self._done:
                return
            self._done, self._error = True, error
        self._link.futures.discard(self)
        self._trigger.set_result(None)


def give_up_soon(futures: list[AbortableFuture]) -> None:
    """Complete what has not ended by itself after a moment, on a thread of its own."""
    if futures:
        timer = threading.Timer(GRACE_S, _give_up, (futures,))
        timer.daemon = True
        timer.start()


def _give_up(futures: list[AbortableFuture]) -> None:
    for future in futures:
        future.give_up()
