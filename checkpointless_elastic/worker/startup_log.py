"""A rank's collectives before its first step, in its slot: its replacement gets the same answers."""

from __future__ import annotations

import msgspec

from checkpointless_elastic.groups.host import LoggedCollective
from checkpointless_elastic.state.slot import Slot

__all__ = ["StartupLog"]

MAX_ENTRIES = 20_000


class StartupLog:
    """``replays``: in a replacement, what the lost rank has logged is read."""

    def __init__(self, slot: Slot, *, replays: bool) -> None:
        self._slot = slot
        self._logged = 0
        self._known: dict[str, list[LoggedCollective]] = {}
        for entry in slot.entries() if replays else ():
            group, op, outputs = msgspec.msgpack.decode(entry, type=tuple[str, str, tuple[bytes, ...] | None])
            self._known.setdefault(group, []).append(LoggedCollective(group, op, outputs))

    def append(self, entry: LoggedCollective) -> None:
        """Keep one more, up to MAX_ENTRIES."""
        if self._logged < MAX_ENTRIES:
            self._logged += 1
            self._slot.append(msgspec.msgpack.encode((entry.group, entry.op, entry.outputs)))

    def next(self, group: str) -> LoggedCollective | None:
        """The next one of this group, taken away; None if there is none left."""
        queue = self._known.get(group)
        return queue.pop(0) if queue else None
