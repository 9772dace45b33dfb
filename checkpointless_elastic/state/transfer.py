"""Copying state: survivors publish their stripes, a replacement receives and checks them.

A stripe is published by a copy into a segment, or, on CUDA, by leave to read it where it is (`state.device`).

Each chunk (4 MiB) is copied and digested while it is in the cache. The receiver uses some threads, since the survivors
wait and their cores are free. It digests what has arrived: the live tensor itself where a chunk is part of one dense
tensor, else a private copy of the chunk that the tensors are then filled from. Nothing here talks to peers or waits for
them: the caller says when a stripe is published.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import msgspec
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.device import gathered
from checkpointless_elastic.state.digest import BLOCK_BYTES, Digest, digest_bytes
from checkpointless_elastic.state.pieces import Piece, byte_view, carrier
from checkpointless_elastic.state.plan import Chunk, Plan, Range, chunks
from checkpointless_elastic.state.segment import Segment

__all__ = [
    "ChunkDigest",
    "Receiver",
    "TransferReport",
    "contents",
    "in_segment",
    "publish",
    "restore",
    "vouch",
]


_MAX_THREADS = 4


class ChunkDigest(msgspec.Struct, frozen=True):
    """What `source` says is in bytes [offset, offset + length) of the segment."""

    source: int
    offset: int
    length: int
    digest: int


class TransferReport(msgspec.Struct, frozen=True):
    """How a transfer went.

    Attributes:
        nbytes: bytes of state that arrived.
        seconds: time of copying and checking.
        bandwidth: bytes per second of copying and checking together.
    """

    nbytes: int
    seconds: float
    bandwidth: float


@dataclass
class _Access:
    """The bytes of one piece: its own memory, or a gathered copy that `write_back` brings home."""

    tensor: torch.Tensor
    data: torch.Tensor
    live: bool

    @classmethod
    def of(cls, piece: Piece, content: bool) -> _Access:
        data = byte_view(piece.tensor)
        if data is not None:
            return cls(piece.tensor, data, True)
        cells = carrier(piece.tensor)
        held = (
            cells.contiguous() if content else torch.empty_like(cells, memory_format=torch.contiguous_format)
        )
        return cls(piece.tensor, held.view(-1).view(torch.uint8), False)

    def write_back(self) -> None:
        if not self.live:
            cells = carrier(self.tensor)
            cells.copy_(self.data.view(cells.dtype).view(cells.shape))


def publish(pieces: Sequence[Piece], plan: Plan, source: int, segment: Segment) -> list[ChunkDigest]:
    """Copy this rank's stripe into the segment and digest it. Blocks until CUDA copies are done.

    The pieces must not change meanwhile: call it while the survivors wait at their gate.
    """
    held: dict[int, _Access] = {}
    result = []
    with torch.no_grad():
        for chunk in chunks(plan.stripes.get(source, ())):
            target = segment.bytes[chunk.offset : chunk.offset + chunk.length]
            for part in chunk.ranges:
                if part.piece not in held:
                    held[part.piece] = _Access.of(pieces[part.piece], content=True)
                begin = part.segment_offset - chunk.offset
                data = held[part.piece].data[part.offset : part.offset + part.length]
                target[begin : begin + part.length].copy_(data)
            found = digest_bytes(target, _home(pieces, chunk))
            result.append(ChunkDigest(source, chunk.offset, chunk.length, found))
    return result


def vouch(pieces: Sequence[Piece], plan: Plan, source: int) -> list[ChunkDigest]:
    """The digests of this rank's stripe, where the pieces are. Waits for the device."""
    return [
        ChunkDigest(source, chunk.offset, chunk.length, digest_bytes(data, _home(pieces, chunk)))
        for chunk, data in contents(pieces, plan, source)
    ]


def contents(pieces: Sequence[Piece], plan: Plan, source: int) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """The chunks of this rank's stripe and their bytes as a segment would have them, on the device of the pieces."""
    data = [_Access.of(piece, content=True).data for piece in pieces]
    for chunk in chunks(plan.stripes.get(source, ())):
        yield chunk, gathered(data, chunk)


class Receiver:
    """Fills a replacement's tensors, chunk by chunk as they are published or arrive, by one caller.

    ``read(source, chunk)`` gives the bytes of a chunk, as they were published. The order of calls: `receive`, or
    `taking` for the chunks of all sources, then `finish`.
    """

    def __init__(
        self, pieces: Sequence[Piece], plan: Plan, read: Callable[[int, Chunk], torch.Tensor]
    ) -> None:
        self._pieces = pieces
        self._plan = plan
        self._read = read
        self._held: dict[int, _Access] = {}
        self._missing = {rank: len(chunks(stripe)) for rank, stripe in plan.stripes.items() if stripe}
        self._nbytes = 0
        self._seconds = 0.0

    def receive(self, digests: Iterable[ChunkDigest]) -> None:
        """Copy the stripes of all sources into the live tensors and check them.

        Raises StateMismatchError that names piece and source if a chunk is damaged or was not published.
        """
        started = perf_counter()
        with self.taking(digests) as take:
            for source, stripe in self._plan.stripes.items():
                for chunk in chunks(stripe):
                    take(source, chunk)
        self._seconds += perf_counter() - started

    @contextmanager
    def taking(self, digests: Iterable[ChunkDigest]) -> Iterator[Callable[[int, Chunk], None]]:
        """Gives what has a chunk copied and checked by a thread beside, for the caller to go on meanwhile.

        At the end it waits for all that were taken, and raises as `receive` does. Its time is not counted.
        """
        promised = {(item.source, item.offset): item for item in digests}
        done: list[Future[None]] = []

        def take(source: int, chunk: Chunk) -> None:
            for part in chunk.ranges:
                if part.piece not in self._held:
                    self._held[part.piece] = _Access.of(self._pieces[part.piece], content=False)
            said = promised.get((source, chunk.offset))
            done.append(pool.submit(self._receive_chunk, chunk, source, said))
            self._nbytes += sum(part.length for part in chunk.ranges)
            self._missing[source] -= 1

        with ThreadPoolExecutor(_threads()) as pool:
            yield take
        for one in done:
            one.result()

    def finish(self) -> TransferReport:
        """Complete tensors with holes; to be called when all sources are received."""
        missing = sorted(source for source, count in self._missing.items() if count)
        if missing:
            raise StateMismatchError(f"State of source ranks {missing} never arrived.")
        started = perf_counter()
        with torch.no_grad():
            for access in self._held.values():
                access.write_back()
        seconds = self._seconds + perf_counter() - started
        rate = self._nbytes / seconds if seconds else 0.0
        return TransferReport(self._nbytes, seconds, rate)

    @torch.no_grad()
    def _receive_chunk(self, chunk: Chunk, source: int, promised: ChunkDigest | None) -> None:
        """On a thread of the pool; no two chunks share a byte of a tensor."""
        if promised is None or promised.length != chunk.length:
            raise StateMismatchError(
                f"Rank {source} did not publish {self._names(chunk)} (offset {chunk.offset})."
            )
        sent = self._read(source, chunk)
        if len(chunk.ranges) == 1:
            self._check(self._copied(self._data(chunk.ranges[0]), sent, chunk), chunk, promised)
            return
        arrived = torch.empty_like(sent)
        self._check(self._copied(arrived, sent, chunk), chunk, promised)
        for part in chunk.ranges:
            begin = part.segment_offset - chunk.offset
            self._data(part).copy_(arrived[begin : begin + part.length])

    def _copied(self, target: torch.Tensor, source: torch.Tensor, chunk: Chunk) -> int:
        """Copy, and give the digest of what has arrived. On the CPU each block is digested while cached."""
        step = BLOCK_BYTES if target.device.type == "cpu" else max(target.numel(), 1)
        result = Digest(target.numel(), _home(self._pieces, chunk))
        for start in range(0, target.numel(), step):
            part = target[start : start + step]
            part.copy_(source[start : start + step])
            result.add(part)
        return result.value()

    def _data(self, part: Range) -> torch.Tensor:
        return self._held[part.piece].data[part.offset : part.offset + part.length]

    def _check(self, found: int, chunk: Chunk, promised: ChunkDigest) -> None:
        if found != promised.digest:
            raise StateMismatchError(
                f"State from rank {promised.source} was damaged on its way: {self._names(chunk)} has digest "
                f"{found:016x} instead of {promised.digest:016x} (segment offset {chunk.offset})."
            )

    def _names(self, chunk: Chunk) -> str:
        keys = [self._pieces[part.piece].key for part in chunk.ranges]
        return (
            keys[0] if len(keys) == 1 else f"{keys[0]} or one of the {len(keys) - 1} pieces up to {keys[-1]}"
        )


def _home(pieces: Sequence[Piece], chunk: Chunk) -> str:
    """The type of the device on which the pieces of a chunk live; it is the same for all of a block."""
    return pieces[chunk.ranges[0].piece].info.device


def _threads() -> int:
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


def in_segment(segment: Segment) -> Callable[[int, Chunk], torch.Tensor]:
    """Reads chunks that were published into a segment."""
    return lambda _, chunk: segment.bytes[chunk.offset : chunk.offset + chunk.length]


def restore(
    pieces: Sequence[Piece], plan: Plan, segment: Segment, digests: Sequence[ChunkDigest]
) -> TransferReport:
    """Fill the live tensors in place from a segment that all sources have published."""
    receiver = Receiver(pieces, plan, in_segment(segment))
    receiver.receive(digests)
    return receiver.finish()
