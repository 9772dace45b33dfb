"""Outputs of collectives outside of steps: kept for a replacement of this rank, and answered from in shadow.

A replacement asks in the order in which its script issues collectives on a group, so entries are handed to the host
in that order, whatever the order in which asynchronous ones end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from checkpointless_elastic.errors import ScriptMismatchError
from checkpointless_elastic.groups.host import Host, LoggedCollective
from checkpointless_elastic.groups.ops import Call, Op
from checkpointless_elastic.tensor_bytes import to_bytes

__all__ = ["MAX_BYTES", "Entry", "OutputLog", "write_logged"]

MAX_BYTES = 1 << 20
"""Outputs of one collective over this are not kept, such as DDP's broadcast of the parameters."""


@dataclass(eq=False)
class Entry:
    """A collective in the log, in order of issue.

    Attributes:
        op: what it is.
        call: its arguments.
        native: the native work while it is in flight.
        logged: what the host is given, None while it has not ended.
    """

    op: Op
    call: Call
    native: Any = None
    logged: LoggedCollective | None = None

    def ended(self) -> bool:
        """True for one that ended well and was only awaited through its future. Does not block."""
        if self.native is None or not self.native.is_completed():
            return False
        try:
            self.native.wait()
        except RuntimeError:  # it failed, which whoever waits for it is told
            return False
        return True


class OutputLog:
    """The open entries of each group. Used by one thread at a time."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._open: dict[str, deque[Entry]] = {}

    def open(self, group: str, op: Op, call: Call) -> Entry:
        """A collective is about to be issued. Hands over earlier ones that ended without being waited for."""
        entry = Entry(op, call)
        entries = self._open.setdefault(group, deque())
        entries.append(entry)
        self._hand_over(group, entries)
        return entry

    def close(self, group: str, entry: Entry) -> None:
        """The collective has ended: its outputs are copied now, before the script may change them."""
        if entry.logged is None:
            entry.logged = LoggedCollective(group, entry.op.name, _outputs(_logged(entry.op, entry.call)))
        self._hand_over(group, self._open[group])

    def drop(self, group: str, entry: Entry) -> None:
        """The collective was never issued, or failed with an error of the script's own."""
        entries = self._open[group]
        if entry in entries:
            entries.remove(entry)

    def _hand_over(self, group: str, entries: deque[Entry]) -> None:
        while entries and (entries[0].logged is not None or entries[0].ended()):
            entry = entries.popleft()
            outputs = entry.logged or LoggedCollective(
                group, entry.op.name, _outputs(_logged(entry.op, entry.call))
            )
            self._host.record(outputs)


def _logged(op: Op, call: Call) -> list[torch.Tensor]:
    """What a replacement needs: also the root's own tensor of a broadcast, which may hold a seed it drew."""
    return call.tensors(0) if op.name == "broadcast" else op.writes(call)


def _outputs(tensors: list[torch.Tensor]) -> tuple[bytes, ...] | None:
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return None
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MAX_BYTES:
        return None
    return tuple(map(to_bytes, tensors))


def write_logged(entry: LoggedCollective, op: Op, call: Call, position: int) -> bool:
    """Writes logged outputs where the collective would. False if they were too large to be kept.

    Raises ScriptMismatchError, saying where the two runs part, if the log holds another collective or other sizes.
    """
    where = f"collective {position} of group {entry.group}"
    if entry.op != op.name:
        raise ScriptMismatchError(
            f"The replacement's script parts from the lost rank's at {where}: {op.name} here, {entry.op} there. "
            "Make what the script does before its first step the same in every start."
        )
    if entry.outputs is None:
        return False
    outputs = _logged(op, call)
    sizes = [output.numel() * output.element_size() for output in outputs]
    if sizes != [len(data) for data in entry.outputs]:
        raise ScriptMismatchError(
            f"The replacement's script parts from the lost rank's at {where}, {op.name}: outputs of {sizes} bytes "
            f"here, {[len(data) for data in entry.outputs]} there. Make their shapes the same in every start."
        )
    for output, data in zip(outputs, entry.outputs, strict=True):
        _write(output, data)
    return True


def _write(output: torch.Tensor, data: bytes) -> None:
    if data:
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(output.dtype)
        output.data.copy_(values.reshape(output.shape))
