"""Which replica sends which bytes. Pure: the same arguments give the same plan on every rank.

All pieces are laid out in one byte space, the segment, each at a multiple of 64. The space of the pieces that have the
same live replicas is cut into stripes of nearly equal size, one per replica, at multiples of 64, also inside a piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

__all__ = ["ALIGNMENT", "CHUNK_BYTES", "Chunk", "PieceSize", "Plan", "Range", "chunks", "plan"]

ALIGNMENT = 64
CHUNK_BYTES = 4 << 20


class PieceSize(msgspec.Struct, frozen=True):
    """What the plan must know of a piece.

    Attributes:
        nbytes: bytes that travel.
        replicas: ranks that hold the same bytes; None means all ranks.
    """

    nbytes: int
    replicas: frozenset[int] | None = None


class Range(msgspec.Struct, frozen=True):
    """`length` bytes of piece number `piece`, from `offset` in the piece, at `segment_offset` in the segment."""

    piece: int
    offset: int
    length: int
    segment_offset: int


class Chunk(msgspec.Struct, frozen=True):
    """The unit of copying and checking: bytes [offset, offset + length) of the segment, and what lies in them."""

    offset: int
    length: int
    ranges: tuple[Range, ...]


class Plan(msgspec.Struct, frozen=True):
    """The result of `plan`.

    Attributes:
        stripes: source rank to the ranges that it sends, in ascending order of segment_offset.
        segment_bytes: size of the segment.
        unsourced: numbers of the pieces that have no live replica.
    """

    stripes: Mapping[int, tuple[Range, ...]]
    segment_bytes: int
    unsourced: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that travel, without the padding between pieces."""
        return sum(part.length for stripe in self.stripes.values() for part in stripe)


def plan(pieces: Sequence[PieceSize], sources: Iterable[int]) -> Plan:
    """Lay the pieces out and share them among the live ranks `sources`.

    Pieces without bytes need no source. Pieces whose replicas are all lost are listed in `unsourced`.
    """
    live = frozenset(sources)
    groups: dict[frozenset[int], list[int]] = {}
    unsourced = []
    for number, piece in enumerate(pieces):
        holders = live if piece.replicas is None else live & piece.replicas
        if piece.nbytes and holders:
            groups.setdefault(holders, []).append(number)
        elif piece.nbytes:
            unsourced.append(number)
    stripes: dict[int, list[Range]] = {rank: [] for rank in sorted(live)}
    start = 0
    for holders in sorted(groups, key=sorted):
        placed = _place(pieces, groups[holders], start)
        end = _aligned(placed[-1].segment_offset + placed[-1].length)
        for rank, low, high in _cut(start, end, sorted(holders)):
            stripes[rank].extend(_within(placed, low, high))
        start = end
    return Plan({rank: tuple(ranges) for rank, ranges in stripes.items()}, start, tuple(unsourced))


def chunks(stripe: Sequence[Range], size: int = CHUNK_BYTES) -> list[Chunk]:
    """Cut a stripe into chunks of at most `size` bytes of the segment, without a gap over 63 bytes in a chunk."""
    result: list[Chunk] = []
    held: list[Range] = []
    for part in _split(stripe, size):
        if held and not _fits(held, part, size):
            result.append(_chunk(held))
            held = []
        held.append(part)
    return [*result, _chunk(held)] if held else result


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _place(pieces: Sequence[PieceSize], numbers: Sequence[int], start: int) -> list[Range]:
    """Whole pieces, one behind the other from `start`, each at a multiple of 64."""
    placed = []
    for number in numbers:
        placed.append(Range(number, 0, pieces[number].nbytes, start))
        start = _aligned(start + pieces[number].nbytes)
    return placed


def _cut(start: int, end: int, ranks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Nearly equal parts of [start, end), borders at multiples of 64."""
    blocks = (end - start) // ALIGNMENT
    for index, rank in enumerate(ranks):
        low = start + blocks * index // len(ranks) * ALIGNMENT
        high = start + blocks * (index + 1) // len(ranks) * ALIGNMENT
        yield rank, low, high


def _within(placed: Sequence[Range], low: int, high: int) -> Iterator[Range]:
    """The parts of the ranges that lie in [low, high) of the segment."""
    for part in placed:
        begin = max(low, part.segment_offset)
        stop = min(high, part.segment_offset + part.length)
        if begin < stop:
            yield Range(part.piece, part.offset + begin - part.segment_offset, stop - begin, begin)


def _split(stripe: Sequence[Range], size: int) -> Iterator[Range]:
    for part in stripe:
        for at in range(0, part.length, size):
            length = min(size, part.length - at)
            yield Range(part.piece, part.offset + at, length, part.segment_offset + at)


def _fits(held: Sequence[Range], part: Range, size: int) -> bool:
    """Whether `part` can join a chunk; full chunks of one piece stay alone, so that they are copied directly."""
    end = part.segment_offset + part.length
    gap = part.segment_offset - (held[-1].segment_offset + held[-1].length)
    return gap < ALIGNMENT and end - held[0].segment_offset <= size


def _chunk(held: Sequence[Range]) -> Chunk:
    start = held[0].segment_offset
    return Chunk(start, held[-1].segment_offset + held[-1].length - start, tuple(held))
