"""The handle of one collective, for Python and for C++ callers such as DDP's reducer.

It subclasses torch's Work, so that a wait in C++ reaches `wait` below. Read in torch 2.13: `PyProcessGroup.hpp` calls
`wait` and `get_future` on a Python work and nothing else.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import Work

from checkpointless_elastic.groups.backward import asked_by_reducer, completed, ended_with_backward
from checkpointless_elastic.groups.host import Situation
from checkpointless_elastic.groups.waiting import SLICE, AbortableFuture

if TYPE_CHECKING:
    from checkpointless_elastic.groups.elastic import ElasticProcessGroup
    from checkpointless_elastic.groups.link import Link
    from checkpointless_elastic.groups.ops import Call, Op
    from checkpointless_elastic.groups.owed import Kept
    from checkpointless_elastic.groups.spec import GroupSpec

__all__ = ["ElasticWork", "wait_for"]

_NO_TIMEOUT = timedelta(0)


class ElasticWork(Work):
    """One collective on an elastic group: in flight on a native group, or filled and done.

    Attributes:
        group: the elastic group.
        link: the native group on which it was issued, None if it was filled at once.
        native: the native work, None once it was filled.
        op: what it is.
        method: the name of the method that issued it.
        args: its positional arguments.
        kwargs: its named arguments.
        kept: what is needed to repeat or log it, None inside a replayable function.
        apart: it was issued in `Situation.APART`, whoever awaits it.
    """

    __slots__ = ("apart", "args", "group", "kept", "kwargs", "link", "method", "native", "op")

    def __init__(
        self,
        group: ElasticProcessGroup,
        link: Link | None,
        native: Any,
        op: Op,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Kept | None = None,
    ) -> None:
        Work.__init__(self)
        self.group = group
        self.link = link
        self.native = native
        self.op = op
        self.method = method
        self.args = args
        self.kwargs = kwargs
        self.kept = kept
        self.apart = False

    def call(self) -> Call:
        """The arguments by position."""
        return self.op.call(self.args, self.kwargs, self.group.rank(), self.group.size())

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Blocks until the collective has ended. If it lost a member its outputs are filled and it returns True.

        Raises the native error when no loss explains it, RankLostError where it can neither be filled nor repeated.
        """
        native, link = self.native, self.link
        if native is None or link is None:
            return True
        on_device = link.device is not None and link.on_device(self.args, self.kwargs)
        try:
            done = link.wait(native, timeout, on_device)
            if on_device and self._must_be_sure():
                torch.cuda.current_stream(link.device).synchronize()
        except RuntimeError as error:
            if not self.group.engine.failed(self, error):
                raise
            return True
        link.in_flight.discard(native)
        if link.void and on_device:
            self.group.engine.failed(self, RuntimeError("the communicator was aborted"))
        elif self.kept is not None:
            self.group.engine.succeeded(self)
        return done

    def _must_be_sure(self) -> bool:
        """Whether this thread must know how a collective on a device ends, since no gate follows that waits for it."""
        return self.kept is not None or self.group.engine.host.situation() is not Situation.ATTEMPT

    def get_future(self) -> Any:
        """A future of the outputs. That of a gloo collective in flight ends with them as they are if it is void."""
        native, link = self.native, self.link
        by_itself = self.group.engine.native_futures or (
            link is not None and link.on_device(self.args, self.kwargs)
        )
        if asked_by_reducer() and not by_itself:
            return ended_with_backward(self._outputs(), self.wait)
        if native is None or link is None:
            return completed(self._outputs())
        if by_itself:
            return native.get_future()
        # holds neither this work nor the native one: a thread of gloo may let go of it last
        outputs = partial(_outputs, self.op, self.args, self.kwargs, self.group.spec)
        return AbortableFuture(native.get_future(), outputs, link).future

    def _outputs(self) -> list[torch.Tensor]:
        return self.call().tensors(0)

    def get_future_result(self) -> Any:
        """A future of the native result code."""
        return self.get_future() if self.native is None else self.native.get_future_result()

    def is_completed(self) -> bool:
        """True if a wait would not block. Does not block."""
        return self.native is None or bool(self.native.is_completed())

    def is_success(self) -> bool:
        """True if it has ended without an error."""
        return self.native is None or bool(self.native.is_success())

    def exception(self) -> Any:
        """The native error, None without one."""
        return None if self.native is None else self.native.exception()

    def result(self) -> list[torch.Tensor]:
        """The outputs."""
        if self.native is None:
            return self.call().tensors(0)
        outputs: list[torch.Tensor] = self.native.result()
        return outputs

    def source_rank(self) -> int:
        """The sender of a receive from any rank; the next rank if it was filled."""
        if self.native is None:
            return (self.group.rank() + 1) % self.group.size()
        return int(self.native.source_rank())

    def _source_rank(self) -> int:
        return self.source_rank()

    def synchronize(self) -> None:
        """Makes the current stream wait for the outputs."""
        if self.native is not None:
            self.native.synchronize()

    def block_current_stream(self) -> None:
        """Makes the current stream wait without blocking this thread."""
        if self.native is not None:
            self.native.block_current_stream()

    def _get_op_type(self) -> Any:
        return Work._get_op_type(self) if self.native is None else self.native._get_op_type()  # type: ignore[attr-defined]

    def _get_duration(self) -> float:
        return 0.0 if self.native is None else float(self.native._get_duration())


def wait_for(link: Link, native: Any, group: ElasticProcessGroup, *call: Any) -> None:
    """What `ElasticWork.wait` does for a collective inside a replayable function, whose work need not be made then."""
    if not link.void:
        try:
            native.wait(SLICE)
        except RuntimeError:
            pass  # not yet, or not well
        else:
            link.in_flight.discard(native)
            return
    ElasticWork(group, link, native, *call).wait()


def _outputs(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], spec: GroupSpec) -> list[torch.Tensor]:
    return op.call(args, kwargs, spec.rank, spec.size).tensors(0)
