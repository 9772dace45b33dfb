"""Where a rank stands in the loops of its script: a stack of frames, from the root to the loop it is in.

A frame describes the current iteration of one loop: how many replayable calls it has committed and what they
returned, which loops were run and ended inside it, which collectives it issued outside replayable functions,
and the random state that its iterator was created with and its item fetched with. When the next iteration
starts, all this is cleared. The cursor goes to the rank's slot after each change that counts, so that a
replacement can run the script again to the same point: see `checkpointless_elastic.data.resume`.

Nothing here does I/O, and nothing blocks. A cursor belongs to the main thread of its worker.
"""

from __future__ import annotations

import functools

import msgspec

from checkpointless_elastic.data.lasting import Kept, Lasting, Loaders
from checkpointless_elastic.errors import ConfigError
from checkpointless_elastic.worker.rng import RngState

__all__ = [
    "CALL_BYTES",
    "KEPT_BYTES",
    "KEPT_LOOPS",
    "KEPT_RNG",
    "Call",
    "Cursor",
    "Frame",
    "Outside",
    "describe",
]

KEPT_BYTES = 1 << 18
"""Bytes of calls that are kept of one iteration; beyond it all but the last are only counted, the oldest first."""
CALL_BYTES = 64
"""What a call counts for, besides its return value."""
KEPT_RNG = 8
"""The last calls of one iteration whose random state is kept."""
KEPT_LOOPS = 8
"""The last loops that ended in one iteration that are kept; a replacement passes over older ones."""


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One committed replayable call.

    Attributes:
        value: its encoded return value, None if it is not kept and a replica has to be asked.
        rng: the random state when it returned, None if it is not kept.
    """

    value: bytes | None
    rng: RngState | None = None

    @property
    def missing(self) -> bool:
        """True when the return value has to be asked of a replica."""
        return self.value is None


class Outside(msgspec.Struct, frozen=True, array_like=True):
    """One collective issued outside replayable functions: group, name and output (None: not kept)."""

    group: str
    op: str
    output: bytes | None


class Frame(msgspec.Struct, array_like=True):
    """One loop, seen in its current iteration.

    Attributes:
        kind: "root", "epochs", "batches" or "steps".
        ordinal: which loop it is within the current iteration of its parent, from 0.
        path: the ordinals from the root to it, a place in the script whatever the iterations.
        position: the current iteration, from 0; -1 before the first.
        finished: it has ended, by exhaustion or `break`; `position` is then its last iteration.
        compact: it ended so long ago that a replacement does not enter it again; only the fields above are
        kept.
        earlier: how many of the replayable calls committed in this iteration are only counted, the oldest.
        calls: the others.
        children: the loops that ended in this iteration. One that has not ended is the next frame of the
        stack.
        outside: the collectives issued outside replayable functions. The first `setup` of them belong to the
            creation of the iterator and are kept over all iterations.
        fetched: how many the first fetch issued. They belong to the creation too (a generator begins with it), unless
            the second fetch issues some as well.
        rng_create: random state before the iterator was created.
        rng_start: random state before this iteration's item was fetched.
        rng_end: random state after the iterator was exhausted; None if the loop was left by `break`.
        dealing: how many ranks the sampler deals to, and which one of them this is; None where it does not deal.
        deals: the same for what it dealt before the number of ranks changed, with the iterations up to which it did
            (-1: all that follow), see `checkpointless_elastic.data.dealing`.
        source_create, source_start: what else the source of the items needs, at the same two moments; the second one
            apart from what does not change within a pass.
    """

    kind: str
    ordinal: int = 0
    position: int = -1
    finished: bool = False
    compact: bool = False
    earlier: int = 0
    calls: list[Call] = []
    children: list[Frame] = []
    outside: list[Outside] = []
    setup: int = 0
    rng_create: RngState | None = None
    rng_start: RngState | None = None
    rng_end: RngState | None = None
    source_create: Kept = Kept()
    source_start: tuple[bytes, ...] = ()
    path: str = ""
    kept: int = 0
    dealing: tuple[int, int] | None = None
    deals: list[tuple[int, int, int]] = []
    fetched: int = 0

    @property
    def committed(self) -> int:
        """The replayable calls committed in this iteration."""
        return self.earlier + len(self.calls)

    def call(self, number: int) -> Call:
        """One of them, from 0; a call that is only counted has neither value nor random state."""
        return Call(None) if number < self.earlier else self.calls[number - self.earlier]

    def commit(self, value: bytes | None, rng: RngState | None) -> None:
        """Note a committed call; let go of what is beyond the limits."""
        self.calls.append(Call(value, rng))
        self.kept += CALL_BYTES + len(value or b"")
        while self.kept > KEPT_BYTES and len(self.calls) > 1:
            self.kept -= CALL_BYTES + len(self.calls.pop(0).value or b"")
            self.earlier += 1
        if len(self.calls) > KEPT_RNG:
            self.calls[-KEPT_RNG - 1] = Call(self.calls[-KEPT_RNG - 1].value)

    def advance(self, outside_from: int) -> None:
        """Go to the next iteration; `outside` keeps what belongs to the iterator and to this item's fetch."""
        issued = len(self.outside) - outside_from
        self.position += 1
        if self.position == 0:
            self.setup, self.fetched = outside_from, issued
        elif self.position == 1:
            self.fetched = 0 if issued else self.fetched
            self.setup += self.fetched
        if self.outside:
            self.outside = self.outside[: self.setup] + self.outside[outside_from:]
        self.calls, self.children, self.kept, self.earlier = [], [], 0, 0

    def made_again(self, issued: int) -> None:
        """A replacement has made the iterator of this iteration, and issued so many collectives for it.

        What the first fetch issued beyond that was for its item.
        """
        if self.setup - self.fetched <= issued < self.setup:
            del self.outside[issued : self.setup]
            self.setup = issued

    def ended(self, child: Frame) -> None:
        """Keep a loop that ended in this iteration; make the one that is now too old compact."""
        self.children.append(child)
        if len(self.children) > KEPT_LOOPS:
            old = self.children[-KEPT_LOOPS - 1]
            self.children[-KEPT_LOOPS - 1] = Frame(
                old.kind, old.ordinal, old.position, finished=True, compact=True
            )


class Cursor(msgspec.Struct, array_like=True, dict=True):
    """Where one rank is. Two ranks that did the same have equal cursors.

    Attributes:
        stack: the frames, the root first.
        lasting: what its loaders keep from one pass to the next.
    """

    stack: list[Frame]
    lasting: list[Lasting] = []

    @classmethod
    def new(cls) -> Cursor:
        """The cursor of a rank that has done nothing yet."""
        return cls([Frame("root", position=0)])

    @functools.cached_property
    def loaders(self) -> Loaders:
        """The loaders of this process that `lasting` is about; not part of what is encoded or compared."""
        return Loaders(self.lasting)

    @property
    def next_path(self) -> str:
        """The `path` of the loop that is entered next."""
        return f"{self.top.path}/{len(self.top.children)}"

    @property
    def top(self) -> Frame:
        """The frame that calls and collectives are noted in: the innermost loop, or the root."""
        return self.stack[-1]

    def enter(
        self,
        kind: str,
        rng: RngState | None = None,
        source: Kept | None = None,
        dealing: tuple[int, int] | None = None,
    ) -> Frame:
        """A loop is entered, before its iterator is created."""
        frame = Frame(kind, len(self.top.children), rng_create=rng, path=self.next_path, dealing=dealing)
        frame.source_create = source or Kept()
        self.stack.append(frame)
        return frame

    def start(
        self,
        frame: Frame,
        rng: RngState | None = None,
        source: tuple[bytes, ...] = (),
        outside_from: int | None = None,
    ) -> None:
        """An item was fetched, the next iteration of `frame` starts; loops left open inside it are dropped.

        Args:
            frame: what `enter` returned.
            rng: the random state before the fetch.
            source: the state of the source before the fetch.
            outside_from: how many collectives `frame.outside` had before the fetch; None: as many as now.
        """
        self._forget_inside(frame)
        frame.advance(len(frame.outside) if outside_from is None else outside_from)
        frame.rng_start, frame.source_start = rng, source

    def commit(self, value: bytes | None = None, rng: RngState | None = None) -> None:
        """A replayable call was committed in the innermost loop. A value that is None or too large
        is missing."""
        self.top.commit(value, rng)

    def issued(self, outside: Outside) -> None:
        """A collective was done outside replayable functions."""
        self.top.outside.append(outside)

    def leave(self, frame: Frame, rng: RngState | None = None) -> None:
        """A loop has ended; loops left open inside it end too. Does nothing if it has been left already."""
        if not any(one is frame for one in self.stack):
            return
        while True:
            left = self.stack.pop()
            left.finished = True
            self.top.ended(left)
            if left is frame:
                break
        frame.rng_end = rng

    def _forget_inside(self, frame: Frame) -> None:
        if self.stack[-1] is frame:
            return
        for depth, one in enumerate(self.stack):
            if one is frame:
                del self.stack[depth + 1 :]
                return
        raise ConfigError(
            f"A loop of Run ({frame.kind}) goes on after the loop around it did, as in zip(run.batches(a), "
            "run.batches(b)); write run.batches(zip(a, b)) instead, so that a replacement can resume it."
        )


def describe(frames: list[Frame]) -> str:
    """In words, the innermost first: "iteration 5 of batches (loop 0) in iteration 1 of epochs (loop 0)"."""
    loops = [f"iteration {one.position} of {one.kind} (loop {one.ordinal})" for one in reversed(frames[1:])]
    return " in ".join(loops) if loops else "the script outside all loops"
