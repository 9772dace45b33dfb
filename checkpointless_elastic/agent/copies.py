"""Private state that is too large for a message: it goes over the connections for mirrors, on their threads.

A rank that has accumulated gradients over several calls has as many bytes of private state as gradients, and more. The
loop must neither read nor send so much at a time: heartbeats would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.guarding import Copy, Done, Large, Recall, Version
from checkpointless_elastic.state.slot import Slot

__all__ = ["SMALL", "Job", "fetch", "fill", "gathered", "give", "send", "size"]

SMALL = 8 << 20
"""Bytes of copies that may wait on the connection for messages, which the loop serves."""


@dataclass(frozen=True)
class Job:
    """A copy to be sent. ``have``: parts that the guardian has; ``log``: send the startup log too; else see Copy."""

    rank: int
    generation: int
    step: int
    have: frozenset[int]
    log: bool
    mirror: Version


def gathered(slot: Slot, job: Job) -> Copy | None:
    """What stands in the rank's slot, without the parts that the guardian has; None if nothing does."""
    content = slot.read()
    log = slot.entries() if job.log else None
    if content is None:
        return None
    parts = {number: part for number, part in content.parts.items() if number not in job.have}
    numbers = list(content.parts)
    return Copy(job.rank, job.generation, job.step, content.blob, numbers, parts, log, job.mirror)


def size(copy: Copy) -> int:
    """Bytes of private state in it."""
    return sum(map(len, _bytes(copy)))


def _bytes(copy: Copy) -> Iterator[bytes]:
    yield copy.blob
    yield from copy.parts.values()
    yield from copy.log or []


def send(wire: Wire, copy: Copy) -> str:
    """Send it to a guardian, or to who takes a seat. Blocks. What keeps the other side from taking it, or ''."""
    log = None if copy.log is None else [len(entry) for entry in copy.log]
    parts = {number: len(part) for number, part in copy.parts.items()}
    bare = Copy(copy.rank, copy.generation, copy.step, b"", copy.numbers, {}, None, copy.mirror)
    wire.send(Large(bare, len(copy.blob), parts, log))
    answer = _done(wire)
    if answer.reason:
        return answer.reason
    for data in _bytes(copy):
        wire.send_memory(memoryview(data))
    return _done(wire).reason


def _done(wire: Wire) -> Done:
    answer = wire.receive()
    if not isinstance(answer, Done):
        raise ProtocolError(f"An agent answered Large with {type(answer).__name__}.")
    return answer


def _receive(wire: Wire, large: Large) -> Copy | None:
    """Take one; None where there is no memory for it, which the other side is told. Blocks."""
    try:
        blob = bytearray(large.blob)
        parts = {number: bytearray(nbytes) for number, nbytes in large.parts.items()}
        log = None if large.log is None else [bytearray(nbytes) for nbytes in large.log]
    except (MemoryError, OverflowError, ValueError):
        wire.send(
            Done(
                f"there is no memory for the {large.nbytes} bytes of private state of rank {large.copy.rank}"
            )
        )
        return None
    wire.send(Done())
    for target in (blob, *parts.values(), *(log or [])):
        wire.receive_into(memoryview(target))
    bare = large.copy
    # bytearrays are as good as bytes to all that read them, and need not be copied once more
    return Copy(bare.rank, bare.generation, bare.step, blob, bare.numbers, parts, log, bare.mirror)  # type: ignore[arg-type]


def fill(wire: Wire, large: Large, came: Callable[[Copy], None]) -> None:
    """Take one, hand it on, and say so. Blocks."""
    copy = _receive(wire, large)
    if copy is not None:
        came(copy)
        wire.send(Done())


def give(wire: Wire, asked: Recall, kept: Callable[[int], Copy | None]) -> None:
    """The guardian's side of `fetch`. Blocks."""
    for rank in asked.ranks:
        copy = kept(rank)
        if copy is not None:
            send(wire, copy)
    wire.send(Done())


def fetch(wire: Wire, ranks: Iterable[int]) -> list[Copy]:
    """What a guardian has of these ranks. Blocks. Errors: see Wire."""
    wire.send(Recall(sorted(ranks)))
    copies: list[Copy] = []
    while isinstance(message := wire.receive(), Large):
        fill(wire, message, copies.append)
    if not isinstance(message, Done):
        raise ProtocolError(f"A guardian answered Recall with {type(message).__name__}.")
    return copies
