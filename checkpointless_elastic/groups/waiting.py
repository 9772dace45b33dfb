"""Waiting for gloo works that may never end.

A gloo pair whose connection fails tells all waiting operations but those whose data stands in its transmit queue: such
a send waits for the group's whole time limit, half an hour by default (read in gloo's transport/tcp/pair.cc,
`signalException` and `sendAsyncMode`, 2026). So a wait looks up from time to time whether its group has become void,
and who waits in C++ is given a future that an abort can complete, or that somebody else completes (see `backward`).

A wait with a time limit is harmless on a collective. On a send or receive it closes every connection of the group when
the limit passes, so these are awaited without one, on a thread beside. So is a reduce-scatter, whose wait has none.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

__all__ = [
    "BRIEFLY",
    "SLICE",
    "AbortableFuture",
    "end_idle",
    "give_up_soon",
    "wait_beside",
    "wait_in_slices",
]

SLICE = timedelta(milliseconds=50)
BRIEFLY = timedelta(milliseconds=1)
_LOOK_UP_S = 0.05
GRACE_S = 0.02
"""How long a void group's works are given to end by themselves."""


def wait_in_slices(native: Any, link: Any, timeout: timedelta) -> bool:
    """`native.wait(timeout)` (zero: no limit), but ends with a RuntimeError soon after the group has become void."""
    deadline = time.monotonic() + timeout.total_seconds() if timeout else None
    while True:
        try:
            done: bool = native.wait(_last_slice(link) if link.void else SLICE)
            return done
        except RuntimeError:
            if native.is_completed():
                ended: bool = native.wait()  # perhaps well, in the moment after the slice had passed
                return ended
            if link.void or (deadline is not None and time.monotonic() >= deadline):
                raise


def _last_slice(link: Any) -> timedelta:
    """What is left of the time for all works of a void group to end by themselves; zero would mean no limit."""
    return max(BRIEFLY, timedelta(seconds=link.void_since + GRACE_S - time.monotonic()))


@dataclass(eq=False)
class _Waiter:
    """A thread that waits for one operation at a time, and is kept for the next.

    Attributes:
        works: what it is to wait for, with the caller's time limit (zero: none); None ends it.
        ended: set when the present one has ended.
        error: how it ended, None if well.
        left_alone: its caller does not wait any more: it ends after this one.
    """

    works: queue.SimpleQueue[tuple[Any, timedelta] | None] = field(default_factory=queue.SimpleQueue)
    ended: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    left_alone: bool = False

    def run(self) -> None:
        """Body of the thread."""
        while not self.left_alone and (work := self.works.get()) is not None:
            native, timeout = work
            del work
            try:
                native.wait(timeout) if timeout else native.wait()
            except BaseException as error:  # raised by the caller
                self.error = error
            del native
            self.ended.set()


_idle: list[_Waiter] = []


def wait_beside(native: Any, link: Any, timeout: timedelta) -> bool:
    """`native.wait(timeout)` on another thread; ends with a RuntimeError soon after the group has become void."""
    waiter = _idle.pop() if _idle else _new_waiter()
    waiter.error = None
    waiter.ended.clear()
    waiter.works.put((native, timeout))
    while not waiter.ended.wait(_LOOK_UP_S):
        if link.void and not waiter.ended.wait(GRACE_S):
            waiter.left_alone = True
            raise RuntimeError("The group became void while an operation was under way.")
    _idle.append(waiter)
    if waiter.error is not None:
        raise waiter.error
    return True


def end_idle() -> None:
    """End the threads that wait for nothing."""
    while _idle:
        _idle.pop().works.put(None)


def _new_waiter() -> _Waiter:
    waiter = _Waiter()
    threading.Thread(target=waiter.run, name="checkpointless-wait", daemon=True).start()
    return waiter


class AbortableFuture:
    """A future of the outputs that ends with the native one, or with the outputs as they are when the group is void.

    It does not hold the link: a thread of gloo may let go of it last, and must not be the one that ends the native
    group, whose destructor joins that thread.

    Attributes:
        future: what is handed out. DDP's reducer takes the list of tensors out of it.
        void: its group is.
    """

    __slots__ = ("_error", "_outputs", "_pending", "_trigger", "_value", "future", "void")

    def __init__(self, native: Any, outputs: Callable[[], list[torch.Tensor]], link: Any) -> None:
        self._outputs = outputs
        self._pending: set[AbortableFuture] = link.futures
        self._error: Exception | None = None
        self._value: Any = None
        self._trigger: Any = torch._C.Future([])  # a torch.futures.Future without its Python half
        # An exception that is set on a Python future is copied by C++ callers without the interpreter's lock, which
        # ends the process. One that a callback raises reaches them as a C++ error.
        self.future = self._trigger.then(self._outcome)
        link.futures.add(self)
        self.void = link.void
        native.add_done_callback(self._ended)
        if link.void:  # an abort on another thread may have looked at `futures` before this one was there
            self.void = True
            give_up_soon([self])

    def _outcome(self, _trigger: Any) -> Any:
        if self._error is not None:
            raise RuntimeError(str(self._error))
        return self._outputs() if self._value is None else self._value

    def _ended(self, native: Any) -> None:
        """On a thread of gloo, or at once."""
        try:
            self._value = native.value()
        except Exception as failure:
            self._error = None if self.void else failure
        self.give_up()

    def give_up(self) -> None:
        """Complete it, with the outputs as they are if the native one has not ended. Any thread."""
        try:
            self._pending.remove(self)  # by one thread only
        except KeyError:
            return
        self._trigger.set_result(None)


def give_up_soon(futures: list[AbortableFuture]) -> None:
    """Complete what has not ended by itself after a moment, on a thread of its own."""
    if futures:
        timer = threading.Timer(GRACE_S, _give_up, (futures,))
        timer.daemon, timer.name = True, "checkpointless-give-up"
        timer.start()


def _give_up(futures: list[AbortableFuture]) -> None:
    for future in futures:
        future.give_up()
