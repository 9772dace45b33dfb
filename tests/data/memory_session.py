"""A session in memory: what worker/session.py does for the loops and calls of one rank, and a way to die at any moment.

A script is a function of a session. `run_to_the_end` runs it once, `run_with_losses` lets it die at given moments and
runs it again in a new session from what the slot held, as a replacement does. The trace has an entry for each call
that was really made and committed: its arguments, its result and the random state at its start, so two traces are
equal only if data, order and random state are, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import torch

from checkpointless_elastic.data import loops
from checkpointless_elastic.data.cursor import Cursor, Frame, Outside
from checkpointless_elastic.data.resume import Resume, Skip
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import rng, rng_memory
from checkpointless_elastic.worker.packing import pack, unpack

Script = Callable[["Session"], None]


def snapshot(cursor: Cursor) -> Content:
    """What a slot holds of it, whatever becomes of the states in this process."""
    content = pack(cursor)
    return Content(content.blob, dict(content.parts))


def comparable(cursor: Cursor) -> bytes:
    """The cursor with the content of its random states in place of their numbers, which other processes gave."""
    content = pack(cursor)
    blob = content.blob
    for number, part in content.parts.items():
        blob = blob.replace(msgspec.msgpack.encode(number), hashlib.sha256(rng_memory.clean(part)).digest())
    return blob


class Killed(BaseException):
    """The rank dies here: nothing that comes later has an effect on the slot."""


class Session:
    """One incarnation. Implements LoopHost."""

    def __init__(self, slot: Content | None = None, die_at: int | None = None) -> None:
        self.cursor = Cursor.new() if slot is None else unpack(slot, Cursor)
        self.resume = None if slot is None else Resume(self.cursor)
        self.slot = snapshot(self.cursor)
        self.trace: list[object] = []
        self.at_call: list[tuple[int, bytes]] = []  # the cursor at the start of each call that was made
        self.moments = 0
        self._die_at = die_at
        self._dead = False
        self._fresh = self.resume is not None

    def moment(self) -> None:
        """A point at which the rank may die."""
        self.moments += 1
        if self.moments == self._die_at:
            self._dead = True
            raise Killed

    def before_first_use(self) -> None:
        if self._fresh and (
            len(self.cursor.stack) > 1 or self.cursor.stack[0].calls or self.cursor.stack[0].children
        ):
            torch.manual_seed(12345)  # a record decides about the random state, not the script's top
        self._fresh = False

    def fetch_begins(self, frame: Frame) -> None:
        """No agent looks."""

    def fetch_ended(self) -> None:
        """No agent looks."""

    def iteration_started(self) -> None:
        self.moment()

    def save(self) -> None:
        self._save()

    def _save(self, *committed: object) -> None:
        """Persist the cursor, and with it, as one thing, the call that it says was committed."""
        self.moment()
        assert not self._dead
        self.slot = snapshot(self.cursor)
        self.trace += committed
        self.moment()

    def epochs(self, n: int) -> Iterator[int]:
        return loops.epochs(n, self)

    def steps(self, n: int) -> Iterator[int]:
        return loops.steps(n, self)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        return loops.batches(loader, self)

    def numbered(self, loader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        return loops.numbered(loader, self)

    def call(self, *arguments: Any) -> float:
        """A replayable call that draws and returns a number."""
        self.before_first_use()
        self.moment()
        if self.resume is not None:
            answer = self.resume.next_call()
            if isinstance(answer, Skip):
                assert answer.rng is not None
                assert answer.value is not None
                rng.restore(answer.rng)
                return float(msgspec.msgpack.decode(answer.value, type=float))
            self.resume = None
        self.at_call.append((len(self.trace), comparable(self.cursor)))
        start = digest(rng.capture())
        self.moment()
        result = float(torch.rand(1)) + float(sum(map(total, arguments)))
        self.cursor.commit(msgspec.msgpack.encode(result), rng.capture())
        self._save((start, [digest(argument) for argument in arguments], result))
        return result

    def outside(self, value: float) -> float:
        """A collective outside replayable functions."""
        self.before_first_use()
        self.moment()
        if self.resume is not None:
            record = self.resume.next_outside("world", "all_reduce")
            if record is not None:
                assert record.output is not None
                return float(msgspec.msgpack.decode(record.output, type=float))
        self.cursor.issued(Outside("world", "all_reduce", msgspec.msgpack.encode(2 * value)))
        self.save()
        return 2 * value


def total(value: Any) -> float:
    """A number that any data item comes to."""
    if isinstance(value, torch.Tensor):
        return float(value.double().sum())
    return float(sum(map(total, value))) if isinstance(value, (list, tuple)) else float(value)


def digest(value: Any) -> str:
    """Equal only for equal bytes."""
    if isinstance(value, rng.RngState):
        raw = b"".join(value.clean())
    elif isinstance(value, torch.Tensor):
        raw = str(value.dtype).encode() + str(tuple(value.shape)).encode() + value.numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        raw = "".join(map(digest, value)).encode()
    else:
        raw = repr(value).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def run_to_the_end(script: Script) -> Session:
    """The run without a fault."""
    session = Session()
    script(session)
    return session


def run_with_losses(script: Script, moments: list[int]) -> tuple[list[object], Session]:
    """Die at these moments of the first incarnations; the trace of all and the last session."""
    slot: Content | None = None
    trace: list[object] = []
    for die_at in [*moments, None]:
        session = Session(slot, die_at)
        try:
            script(session)
        except Killed:
            slot = session.slot
        trace += session.trace
        if not session._dead:
            break
    return trace, session


def assert_a_loss_changes_nothing(script: Script, moments: list[int], whole: Session) -> None:
    """Trace, the cursor at each call after a join, and the cursor at the end are those of the run without a fault."""
    trace, last = run_with_losses(script, moments)
    assert trace == whole.trace, f"after a loss at moments {moments}"
    assert comparable(last.cursor) == comparable(whole.cursor), f"after a loss at moments {moments}"
    behind = len(trace) - len(last.trace)
    for number, cursor in last.at_call:
        assert cursor == whole.at_call[behind + number][1], (
            f"call {behind + number}, loss at moments {moments}"
        )
