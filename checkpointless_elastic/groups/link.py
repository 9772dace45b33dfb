"""One native group inside an elastic one, from its connection to its end."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import OpType  # type: ignore[attr-defined]

from checkpointless_elastic.groups.lazy import Lazy
from checkpointless_elastic.groups.ops import flat
from checkpointless_elastic.groups.owed import Place
from checkpointless_elastic.groups.sockets import Address
from checkpointless_elastic.groups.waiting import BRIEFLY, AbortableFuture, wait_beside, wait_in_slices

__all__ = ["Link", "retire"]

_logger = logging.getLogger(__name__)
_MANY = 32
_NO_LIMIT = timedelta(0)
_POINT_TO_POINT = tuple(map(int, (OpType.SEND, OpType.RECV, OpType.RECVANYSOURCE)))
_BESIDE = (*_POINT_TO_POINT, int(OpType.UNKNOWN))
"""Awaited on a thread beside. The last is gloo's reduce-scatter: a function that waits for an all-reduce, however long
(read in torch 2.13, `LambdaWork`)."""


@dataclass(eq=False)
class Link:
    """A native group.

    Attributes:
        native: the group that does the work; None in shadow, while the group is lazy, and after the end.
        generation: the generation that it was built in.
        own: listening addresses of its gloo devices.
        peers: those of the other members.
        places: how far each member that knows it was in its collectives outside of steps when this was connected.
        limit: of the group, for sends and receives; zero: gloo's own, which is short, since it is that of connecting.
        device: the accelerator of its NCCL backend, None without one. Its index may be missing: a script may choose its
            device after it has made the group.
        void: a member is lost or left: collectives end at once and give filler. Set once, never cleared.
        void_since: when that was, in seconds of the monotonic clock.
        lazy: set in a void link whose group has all its members and is connected at its next use.
        in_flight: native works not known to have ended. They are kept so that the last reference to one is never
            dropped by a thread of the group: that thread would wait for the interpreter's lock, which the group's
            destructor holds while it joins the thread, and the process would be stuck for good.
        futures: those handed out that have not ended.
    """

    native: Any
    generation: int
    own: frozenset[Address] = frozenset()
    peers: frozenset[Address] = frozenset()
    places: list[Place] = field(default_factory=list)
    limit: timedelta = _NO_LIMIT
    device: torch.device | None = None
    void: bool = False
    void_since: float = 0.0
    lazy: Lazy | None = None
    in_flight: set[Any] = field(default_factory=set)
    futures: set[AbortableFuture] = field(default_factory=set)

    def track(self, work: Any) -> None:
        """Keeps a native work until it is known to have ended."""
        if len(self.in_flight) > _MANY:
            self.in_flight.difference_update([old for old in list(self.in_flight) if old.is_completed()])
        self.in_flight.add(work)

    def on_device(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether NCCL carries out a collective with these arguments: the group may have gloo for CPU tensors too."""
        if self.device is None:
            return False
        tensors = flat([*args, *kwargs.values()])
        return not tensors or tensors[0].device.type == self.device.type

    def wait(self, native: Any, timeout: timedelta = _NO_LIMIT, on_device: bool = False) -> bool:
        """Blocks until a native work has ended; soon ends with a RuntimeError if the group is or becomes void.

        With `on_device` the current stream waits instead of this thread, and an abort lets it go on.
        """
        if on_device:
            done: bool = native.wait(timeout) if timeout else native.wait()
            return done
        if int(native._get_op_type()) in _BESIDE:
            return wait_beside(native, self, timeout or self.limit)
        return wait_in_slices(native, self, timeout)

    def pin(self) -> None:
        """Keeps the native group from being destroyed as the process ends, until `unpin`.

        Its destructor joins threads that may wait in an operation for the group's whole time limit.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.native))

    def unpin(self) -> None:
        """Undoes one `pin`."""
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self.native))

    def abort_device(self) -> None:
        """Begins to end the operations of the NCCL backend, on a thread of its own. Any thread; returns at once.

        Sockets of gloo are shut down for all groups in one go, communicators must not be aborted one after the other:
        an abort waits for the kernels of its communicator, which may stand on the device behind those of another one
        that is to be aborted too. It also waits for a communicator that another thread is just connecting (read in
        torch 2.13, `NCCLUtils.hpp`: one lock is held for both), which is let go when another rank aborts.
        """
        if self.device is not None:
            backend = self.native._get_backend(self.device)
            threading.Thread(target=_abort, args=(backend,), name="checkpointless-abort", daemon=True).start()


def _abort(backend: Any) -> None:
    """torch sets the device of each communicator itself (`abortCommsFromMap`)."""
    try:
        backend.abort()
    except RuntimeError as error:  # not within the group's time limit
        _logger.warning(
            "A native group could not be aborted: %s. Its worker may have to be restarted.", error
        )


def retire(links: list[Link]) -> None:
    """Lets go of void native groups, after their work has ended, on a thread of its own. Returns at once."""
    if links:
        threading.Thread(target=_let_go, args=(links,), name="checkpointless-retire", daemon=True).start()


def _let_go(links: list[Link]) -> None:
    for link, work in [(held, work) for held in links for work in list(held.in_flight)]:
        _wait_for_the_end(work, link.void and link.device is None)
    for link in links:
        if link.void:
            link.unpin()
        link.native = None


def _wait_for_the_end(work: Any, void: bool) -> None:
    """But not of sends and receives in a void group: gloo may have forgotten them, and their connections are shut.

    A thread that comes back from native code as the interpreter shuts down aborts the process; so it is there briefly.
    """
    try:
        if void and int(work._get_op_type()) in _POINT_TO_POINT:
            if not work.is_completed():
                work.wait(BRIEFLY)
        else:
            work.wait()
    except RuntimeError as error:  # how a work on a shut down connection ends
        _logger.debug("work of a retired group ended: %s", error)
