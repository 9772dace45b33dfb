"""How a replacement goes through its script again: what the lost rank's record answers, and where it ends.

The replacement holds the cursor of the rank it replaces as its own from the start. This view walks over it:
loops that ended are entered again at their last iteration, the loops that the lost rank stood in at their
current one, committed calls are skipped, collectives outside them are answered. The first request beyond the
record ends the walk: from then on the answers are "live" (None, Join) and the cursor goes on being written.
Since the walk changes nothing, the cursor at that moment equals that of the lost rank, and a second loss
during the walk finds it whole in the slot.

Nothing here does I/O, and nothing blocks. A view belongs to the main thread of its worker.
"""

from __future__ import annotations

import dataclasses

import msgspec

from checkpointless_elastic.data.cursor import Cursor, Frame, Outside, describe
from checkpointless_elastic.errors import ScriptMismatchError
from checkpointless_elastic.worker.rng import RngState

__all__ = ["Join", "Resume", "Skip"]


class Skip(msgspec.Struct, frozen=True):
    """The call is committed already: put `rng` back if it is there, return `value` (None: ask a replica)."""

    value: bytes | None
    rng: RngState | None

    @property
    def missing(self) -> bool:
        """True when the return value has to be asked of a replica."""
        return self.value is None


class Join(msgspec.Struct, frozen=True):
    """The record is at its end: the survivors wait at this call."""


@dataclasses.dataclass
class _At:
    """How far the walk is in one frame: how many of its calls, loops and collectives were met again."""

    frame: Frame
    calls: int = 0
    children: int = 0
    outside: int = 0


class Resume:
    """The walk of one replacement over the cursor of the rank it replaces.

    Attributes:
        live: True once something beyond the record was asked for.
        remaking: an iterator is made again and brought to its place, for which nothing but the record can answer.
        real: all ranks walk, and their collectives are done for real; else they are answered from the record.
    """

    def __init__(self, cursor: Cursor, real: bool = False) -> None:
        self.live, self.real, self.remaking = False, real, False
        self._cursor = cursor
        self._path = [_At(cursor.stack[0])]
        self._parted: ScriptMismatchError | None = None

    @property
    def in_loop(self) -> bool:
        """Whether the script is inside a loop now; during the walk the cursor does not say so."""
        return len(self._cursor.stack) > 1 if self.live else len(self._path) > 1

    def next_loop(self, kind: str) -> Frame | None:
        """A loop is entered: the frame to resume it at, or None when it is entered for the first time.

        Raises:
            ScriptMismatchError: the lost rank did something else here.
        """
        self.check()
        if self.live:
            return None
        record = self._next_child()
        if record is None:
            self._go_live(f"enters a loop ({kind})")
            return None
        if record.kind != kind:
            raise self._mismatch(f"enters a loop of kind {kind}", f"had entered one of kind {record.kind}")
        self._path[-1].children += 1
        self._path.append(_At(record))
        return record

    def next_call(self) -> Skip | Join:
        """A replayable call is asked for: skip it, or join the survivors there."""
        self.check()
        if self.live:
            return Join()
        at = self._path[-1]
        if at.calls < at.frame.committed:
            call = at.frame.call(at.calls)
            at.calls += 1
            return Skip(call.value, call.rng)
        self._go_live(f"makes replayable call {at.calls}")
        return Join()

    def next_outside(self, group: str, op: str) -> Outside | None:
        """A collective outside replayable functions: its record, or None when the lost rank had not done
        it."""
        self.check()
        if self.live:
            return None
        at = self._path[-1]
        if at.outside < len(at.frame.outside):
            record = at.frame.outside[at.outside]
            if (record.group, record.op) != (group, op):
                raise self._mismatch(
                    f"calls {op} on group {group}", f"had called {record.op} on {record.group}"
                )
            at.outside += 1
            return record
        if self.remaking:
            raise self._mismatch(
                f"calls {op} on group {group} to bring a loader to its place",
                "had called it for items that are gone",
            )
        self._go_live(f"calls {op} on group {group}")
        return None

    def met_again(self, outside: Outside) -> None:
        """A collective was done for real during the walk, by all ranks: it is noted where the walk is."""
        at = self._path[-1]
        at.frame.outside.append(outside)
        at.outside += 1

    def outside_done(self, frame: Frame) -> int:
        """How many collectives of `frame` were met again; all of them once live."""
        if not self.live:
            for at in self._path:
                if at.frame is frame:
                    return at.outside
        return len(frame.outside)

    def going_on(self, frame: Frame) -> None:
        """A loop has fetched an item beyond its record: the walk ends here.

        Raises:
            ScriptMismatchError: something of the record was not met again.
        """
        self.check()
        if not self.live:
            self._go_live(f"starts iteration {frame.position + 1} of {frame.kind} (loop {frame.ordinal})")

    def leaving(self, frame: Frame) -> None:
        """A loop is left. May be called while a generator is closed, so a mismatch is raised by the next
        request."""
        depth = self._depth(frame)
        if self.live or self._parted is not None or depth is None:
            return
        try:
            if frame.finished:
                self._check_met(self._path[depth:], f"leaves {frame.kind} (loop {frame.ordinal})")
            else:
                self._go_live(f"leaves {frame.kind} (loop {frame.ordinal})")
        except ScriptMismatchError as error:
            self._parted = error
        del self._path[depth:]

    def check(self) -> None:
        """Raise what `leaving` found. A session calls it when the script ends, the loops when one is
        exhausted."""
        if self._parted is not None:
            raise self._parted

    def _depth(self, frame: Frame) -> int | None:
        return next((depth for depth, at in enumerate(self._path) if at.frame is frame), None)

    def _next_child(self) -> Frame | None:
        at = self._path[-1]
        if at.children < len(at.frame.children):
            return at.frame.children[at.children]
        depth = len(self._path)
        on_stack = depth < len(self._cursor.stack) and self._cursor.stack[depth - 1] is at.frame
        return self._cursor.stack[depth] if on_stack and at.children == len(at.frame.children) else None

    def _go_live(self, what: str) -> None:
        """The record ends here if all of it was met again, else the scripts part."""
        self._check_met(self._path, what)
        depth = len(self._path)
        if self._path[-1].frame is not self._cursor.stack[depth - 1]:
            raise self._mismatch(what, "had left that loop")
        if depth < len(self._cursor.stack):
            raise self._mismatch(what, f"had entered a loop of kind {self._cursor.stack[depth].kind}")
        self.live = True

    def _check_met(self, path: list[_At], what: str) -> None:
        for at in path:
            calls, loops = at.frame.committed, len(at.frame.children)
            if at.calls < calls:
                raise self._mismatch(
                    what, f"had made {calls} replayable calls in {at.frame.kind} and not {at.calls}"
                )
            if at.children < loops:
                raise self._mismatch(what, f"had run {loops} loops in {at.frame.kind} and not {at.children}")

    def _mismatch(self, does: str, had: str) -> ScriptMismatchError:
        where = describe([at.frame for at in self._path])
        return ScriptMismatchError(
            f"The replacement {does} in {where}, where the lost rank {had}; "
            "make the script take the same way for the same data and random state."
        )
