"""Futures that DDP's reducer is given in the middle of a backward, and looks at when the backward ends.

An `AbortableFuture` takes a thread of gloo through the interpreter for each bucket. The reducer needs less: it looks
at its futures in a callback that it queues, with its last bucket, for the end of the backward (read in torch 2.13,
`reducer.cpp`). One that is queued with its first bucket runs before that, and awaits the works as Python does, on the
backward's own thread. By then the buckets hold the result, so the reducer is given completed futures of them, made
once: to make one costs more than all the rest. No other caller is known to look later, so none gets such a future.
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

__all__ = ["asked_by_reducer", "completed", "ended_with_backward", "forget_buckets"]

# Where C++ is entered for a backward; without it nobody is taken for the reducer.
_backward = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)


def asked_by_reducer() -> bool:
    """Whether the caller was called by C++, inside a node of a backward on this thread.

    Where the reducer launches its buckets at the end of the backward and waits at once, `ddp` stands between.
    """
    asks = sys._getframe(1).f_back
    return asks is not None and asks.f_code is _backward and torch._C._current_autograd_node() is not None


class _Awaited:
    """Works of one backward. Its callback holds it: a backward that fails lets go of it.

    Attributes:
        backward: its number.
    """

    def __init__(self, backward: int) -> None:
        self.backward = backward
        self.works: list[ElasticWork] = []

    def end(self) -> None:
        """Await all works, also those of backwards around this one, at which this one's reducer may look.

        A work's error is raised, and ends the backward.
        """
        for one in _thread.alive():
            while one.works:
                one.works[0].wait()  # one that fails stays: nobody must take its outputs to be reduced
                one.works.pop(0)
        _thread.known = [ref for ref in _thread.known if ref() not in (None, self)]


class _Thread(threading.local):
    """What belongs to one thread: its backwards that await works, the innermost last."""

    def __init__(self) -> None:
        self.known: list[weakref.ref[_Awaited]] = []

    def alive(self) -> list[_Awaited]:
        """Those that neither ended nor failed."""
        return [one for ref in self.known if (one := ref()) is not None]


_thread = _Thread()
_buckets: dict[int, Any] = {}  # by address, the completed future of a bucket


def ended_with_backward(work: ElasticWork) -> Any:
    """A completed future of the outputs of a work, which the end of the present backward awaits."""
    backward = torch._C._current_graph_task_id()
    awaited = next((one for one in _thread.alive() if one.backward == backward), None)
    if awaited is None:
        awaited = _Awaited(backward)
        _thread.known.append(weakref.ref(awaited))
        Variable._execution_engine.queue_callback(awaited.end)
    awaited.works.append(work)
    outputs = flat(work.args[0])  # C++ gives arguments by position, outputs first
    if outputs[0].layout is not torch.strided:  # a sparse gradient is another tensor in each backward
        return completed(outputs)
    key = outputs[0]._cdata  # of the bucket, which its future keeps: no other one has this address
    if key not in _buckets:
        _buckets[key] = completed(outputs)
    return _buckets[key]


def completed(outputs: list[torch.Tensor]) -> Any:
    """A completed future of a list of tensors, as C++ expects it: a future made in Python would hold an object.

    `torch._C.fork` outside of tracing runs the function at once and infers the type of its result; an empty list has
    no type to infer, and no C++ caller reads it.
    """
    if outputs:
        return torch._C.fork(lambda: outputs)
    future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
    future.set_result(outputs)
    return future


def forget_buckets() -> None:
    """A reducer has other buckets now, or is gone: let go of the memory of the old ones."""
    _buckets.clear()
