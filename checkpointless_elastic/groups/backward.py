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
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.graph
from torch.autograd import Variable

from checkpointless_elastic.groups.ops import flat

if TYPE_CHECKING:
    from checkpointless_elastic.groups.work import ElasticWork

__all__ = ["asked_by_reducer", "ended_with_backward"]

# Where C++ is entered for a backward; without it nobody is taken for the reducer.
_backward = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)


def asked_by_reducer() -> bool:
    """Whether the caller was called by C++, inside a node of a backward on this thread.

    Where the reducer launches its buckets at the end of the backward and waits at once, `ddp` stands between.
    """
    asks = sys._getframe(1).f_back
    return asks is not None and asks.f_code is _backward and torch._C._current_autograd_node() is not None


class _Awaited:
    """Works of one backward, and their futures. Its callback holds it: a backward that fails lets go of it.

    Attributes:
        backward: its number.
    """

    def __init__(self, backward: int) -> None:
        self.backward = backward
        self.works: list[tuple[ElasticWork, Any]] = []

    def end(self) -> None:
        """Await all works, also those of backwards around this one, for which this one's reducer may wait, and
        complete their futures. A work's error is raised, and ends the backward.
        """
        for one in _thread.alive():
            while one.works:
                work, future = one.works.pop(0)
                work.wait()
                future.set_result(flat(work.args[0]))  # C++ gives arguments by position, outputs first
        _thread.known = [ref for ref in _thread.known if ref() not in (None, self)]


class _Thread(threading.local):
    """What belongs to one thread: its backwards that await works, the innermost last."""

    def __init__(self) -> None:
        self.known: list[weakref.ref[_Awaited]] = []

    def alive(self) -> list[_Awaited]:
        """Those that neither ended nor failed."""
        return [one for ref in self.known if (one := ref()) is not None]


_thread = _Thread()


def ended_with_backward(work: ElasticWork) -> Any:
    """A future of the outputs of a work, which the end of the present backward awaits and completes."""
    backward = torch._C._current_graph_task_id()
    awaited = next((one for one in _thread.alive() if one.backward == backward), None)
    if awaited is None:
        awaited = _Awaited(backward)
        _thread.known.append(weakref.ref(awaited))
        Variable._execution_engine.queue_callback(awaited.end)
    future: Any = torch._C.Future([])  # a torch.futures.Future without its Python half
    awaited.works.append((work, future))
    return future
