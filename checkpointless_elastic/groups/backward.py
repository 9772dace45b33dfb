"""What DDP's reducer is given for its buckets in the middle of a backward, and looks at when the backward ends.

An `AbortableFuture` takes a thread of gloo through the interpreter for each bucket. The reducer needs less: it asks for
the future of each work at once, and looks at it in a callback that it queues, with its last bucket, for the end of the
backward (read in torch 2.13, `reducer.cpp`). A callback that is queued with its first bucket runs before that, and
awaits the works as Python does, on the backward's own thread. By then the buckets hold the result, so the reducer is
given completed works and futures of them, made once: to make one costs more than all the rest. No other caller is known
to look later, so none gets such a one.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.graph
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.autograd import Variable
from torch.distributed import Work

__all__ = [
    "asked_by_reducer",
    "await_at_end",
    "buckets",
    "completed",
    "ended_with_backward",
    "forget_buckets",
]

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
        waits: each awaits one work.
    """

    def __init__(self, backward: int) -> None:
        self.backward = backward
        self.waits: list[Callable[[], object]] = []

    def end(self) -> None:
        """Await all works, also those of backwards around this one, at which this one's reducer may look.

        A work's error is raised, and ends the backward and those around it, unless one of them takes it and goes on.
        """
        known, _thread.known = _thread.known, []
        for one in [*filter(None, (ref() for ref in known)), self]:
            while one.waits:
                one.waits[0]()  # one that fails stays: who goes on must not take its outputs to be reduced
                del one.waits[0]
        _thread.known = [ref for ref in known if ref() not in (None, self)]


class _Thread(threading.local):
    """What belongs to one thread: its backwards that await works and have not ended, the innermost last.

    One that has failed is gone.
    """

    def __init__(self) -> None:
        self.known: list[weakref.ref[_Awaited]] = []


_thread = _Thread()
buckets: dict[int, Work] = {}
"""By address, a completed work of each bucket that the reducer has asked for."""


def await_at_end(wait: Callable[[], object]) -> None:
    """Call ``wait()`` on this thread when the present backward ends."""
    backward = torch._C._current_graph_task_id()
    for ref in reversed(_thread.known):
        awaited = ref()
        if awaited is not None and awaited.backward == backward:
            awaited.waits.append(wait)
            return
    awaited = _Awaited(backward)
    awaited.waits.append(wait)
    _thread.known.append(weakref.ref(awaited))
    Variable._execution_engine.queue_callback(awaited.end)


def ended_with_backward(outputs: list[torch.Tensor], wait: Callable[[], object]) -> Any:
    """A completed future of the outputs of a work, which ``wait()`` awaits at the end of the present backward."""
    await_at_end(wait)
    if outputs[0].layout is not torch.strided:  # a sparse gradient is another tensor in each backward
        return completed(outputs)
    key = outputs[0]._cdata  # of the bucket, which its work keeps: no other one has this address
    if key not in buckets:
        buckets[key] = _create_work_from_future(completed(outputs))
    return buckets[key].get_future()


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
    buckets.clear()
