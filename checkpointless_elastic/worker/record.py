"""A rank's private state in its slot, moment by moment, and beside it what most often follows, in its pulse.

The slot is written when the rank is ready. That the call has then returned, and that its loop has gone on to its next
iteration, are stores to memory where nothing else has changed; else the slot is written again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from checkpointless_elastic.data.cursor import Frame
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import rng
from checkpointless_elastic.worker.packing import pack
from checkpointless_elastic.worker.private import At, PrivateState
from checkpointless_elastic.worker.resize import Own
from checkpointless_elastic.worker.values import encode_value

if TYPE_CHECKING:
    from checkpointless_elastic.worker.pulse import Pulse
    from checkpointless_elastic.worker.run import Run
    from checkpointless_elastic.worker.session import Session

__all__ = ["Record", "follow"]


class Record:
    """Belongs to the Run of this process; main thread only.

    Attributes:
        last_value: encoded return value of the last committed call, for replacements that have not kept theirs.
        own: the private state when that call had returned.
    """

    def __init__(self, session: Session, run: Run) -> None:
        self._session, self._run = session, run
        self.last_value: bytes | None = None
        self.own: Own | None = None
        self._start: PrivateState | None = None
        self._ready: PrivateState | None = None  # until more follows than the pulse can say
        self._content = Content(b"", {})  # the same, as it was written
        # Where that call has returned (loop, iteration, state of its source), if nothing came after it; what slot and
        # pulse say (step, tensors, collectives issued since it), if it is of between steps.
        self._iteration: tuple[Frame, int, tuple[bytes, ...]] | None = None
        self._between: tuple[int, dict[str, bytes], dict[str, int]] | None = None

    def begin(self, state: rng.RngState) -> PrivateState:
        """A step begins with this random state."""
        start = self._start = self._now(At.START, state)
        if not self._says_all(start):
            self._write(start)
        return start

    def ready(self) -> None:
        """The step is computed: keep what a replacement needs if it is committed."""
        assert self._start is not None
        self._ready = msgspec.structs.replace(
            self._start, at=At.READY, ready_rng=rng.capture(), ready_tensors=self._run.read_private()
        )
        self._content = self._write(self._ready)

    def end(self, value: Any) -> None:
        """The call has returned ``value``."""
        self.last_value = encode_value(value)
        state, cursor = rng.capture(), self._session.cursor
        cursor.commit(self.last_value, state)
        if self._follows_from_ready(state):
            top = cursor.top
            self._iteration = top, top.position, top.source_start
            self.own = Own(self._session.step, self._content, ready=True, value=self.last_value)
            return
        self.own = Own(self._session.step, self._write_between())

    def loop_entered(self) -> None:
        """A loop is entered: what it does to the cursor is not in the slot."""
        self._iteration = None

    def between(self) -> None:
        """The cursor has changed, between steps; or in a call after its gate, which `end` will say."""
        if self._session.in_call and self._session.committed:
            self._ready = None
            return
        session = self._session
        if self._has_only_advanced():
            session.pulse.advance(session.slot.sequence)
            self._iteration = None
            self._between = session.step, self._run.private, {}
        else:
            self._write_between()

    def _write(self, state: PrivateState) -> Content:
        content = pack(state)
        self._iteration = self._between = None
        self._session.slot.write(*content)
        return content

    def _write_between(self) -> Content:
        state = self._now(At.BETWEEN, None)
        content = self._write(state)
        self._between = state.step, state.tensors, state.issued
        return content

    def _now(self, at: At, state: rng.RngState | None) -> PrivateState:
        session = self._session
        issued = session.registry.issued()
        return PrivateState(session.step, at, session.cursor, state, self._run.private, issued=issued)

    def _says_all(self, start: PrivateState) -> bool:
        """Whether what a replacement must know here is said already; nothing was drawn since then."""
        kept, frame = self._between, start.cursor.top
        before = frame.calls[-1].rng if frame.calls else frame.rng_start
        return (
            kept is not None
            and len(start.cursor.stack) > 1
            and before is start.rng
            and kept == (start.step, start.tensors, start.issued)
        )

    def _follows_from_ready(self, state: rng.RngState) -> bool:
        """Whether all that has changed since this rank was ready is known without another write to the slot."""
        ready = self._ready
        if ready is None or len(self._session.cursor.stack) == 1:  # the script may end now, which is no loss
            return False
        same = state is ready.ready_rng and self._run.private == ready.ready_tensors
        return same and self._session.pulse.keep(self._session.slot.sequence, self.last_value)

    def _has_only_advanced(self) -> bool:
        """Whether all that has changed since the call returned is that its loop has begun the next iteration."""
        session = self._session
        if self._iteration is None or self._ready is None or session.registry.issued():
            return False
        frame, position, source = self._iteration
        advanced = session.cursor.top is frame and frame.position == position + 1
        return advanced and frame.rng_start is self._ready.ready_rng and frame.source_start == source


def follow(ready: PrivateState, record: int, pulse: Pulse) -> None:
    """The step of a rank that was ready, as this record of its slot says, is committed: bring its cursor up to date."""
    cursor = ready.cursor
    cursor.commit(pulse.kept(record), ready.ready_rng)
    if pulse.advanced(record):
        cursor.start(cursor.top, ready.ready_rng, cursor.top.source_start)
