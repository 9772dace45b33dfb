"""Futures that DDP's reducer is given in the middle of a backward, and looks at when the backward ends.

An `AbortableFuture` takes a thread of gloo through the interpreter for each bucket. The reducer needs less: it waits
for all its futures in a callback that it queues, with its last bucket, for the end of the backward (read in torch 2.13,
`reducer.cpp`). One that is queued with its first bucket runs before that: it awaits the works as Python does, on the
backward's own thread, and completes the futures. No other caller is known to look later, so none gets such a future.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.graph
from torch.autograd import Variable

from checkpointless_elastic.groups.ops import flat

if TYPE_CHECKING:
    from checkpointless_elastic.groups.work import ElasticWork

__all__ = ["asked_by_reducer", "ended_with_backward"]

_backward = torch.autograd.graph._engine_run_backward.__code__


def asked_by_reducer() -> bool:
    """Whether the caller was called by C++, inside a node of a backward on this thread.

    With static_graph the reducer launches its first buckets in a callback, and waits at once: no node is under way.
    """
    asks = sys._getframe(1).f_back
    return asks is not None and asks.f_code is _backward and torch._C._current_autograd_node() is not None


class _Awaited:
    """Works of one backward, and their futures. Its callback holds it: a backward that fails lets go of it.

    Attributes:
        backward: its number.
        around: gives the same of the backward in which this one runs, whose buckets its reducer may wait for too.
    """

    __slots__ = ("__weakref__", "around", "backward", "works")

    def __init__(self, backward: int, around: Callable[[], _Awaited | None]) -> None:
        self.backward, self.around = backward, around
        self.works: list[tuple[ElasticWork, Any]] = []

    def end(self) -> None:
        """Await the works and complete their futures. A work's error is raised, and ends the backward."""
        _thread.newest = self.around
        one: _Awaited | None = self
        while one is not None:
            while one.works:
                work, future = one.works.pop(0)
                work.wait()
                future.set_result(flat(work.args[0]))  # C++ gives arguments by position, outputs first
            one = one.around()


def _nothing() -> None:
    """No backward is under way."""


class _Thread(threading.local):
    """What belongs to one thread: the innermost backward that awaits works."""

    newest: Callable[[], _Awaited | None] = staticmethod(_nothing)


_thread = _Thread()


def ended_with_backward(work: ElasticWork) -> Any:
    """A future of the outputs of a work, which the end of the present backward awaits and completes."""
    backward = torch._C._current_graph_task_id()
    awaited = _thread.newest()
    if awaited is None or awaited.backward != backward:
        awaited = _Awaited(backward, _thread.newest)
        _thread.newest = weakref.ref(awaited)
        Variable._execution_engine.queue_callback(awaited.end)
    future: Any = torch._C.Future([])  # a torch.futures.Future without its Python half
    awaited.works.append((work, future))
    return future
