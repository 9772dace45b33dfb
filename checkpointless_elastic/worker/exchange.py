"""What survivors publish for replacements, and how a replacement receives it, on one node through shared memory.

Pieces with the same replicas travel together: each such *block* has a segment of its own, which the live ranks that
hold it fill in stripes. What is not a tensor comes from a *twin*: a rank that holds all that the lost rank held.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.groups.spec import GroupSignature
from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.state import arena, digest
from checkpointless_elastic.state.pieces import MADE, Manifest, Piece
from checkpointless_elastic.state.plan import PieceSize, Plan, plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import EVERYBODY, Ranks
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver
from checkpointless_elastic.state.transfer import publish as publish_stripe

if TYPE_CHECKING:
    from checkpointless_elastic.worker.run import Run


RESERVED = "state"
EXPECTED = "expected"
"""File that says how much memory the replacement of a rank will need."""
RESERVE_LIMIT = 1 << 30
"""Bytes of state on this node up to which shared memory for it is kept from the first step on: making its pages when a
rank is lost would take time from the replacement. It is one more copy of the state per node."""


class Shared(msgspec.Struct, frozen=True):
    """What is the same on all twins; the lowest of them that lives publishes it.

    Attributes:
        twins: the ranks that it is for.
        manifest: description of all pieces, and state that is not a tensor.
        steps: committed training steps.
        last_value: encoded return value of the last committed call.
        gates: optimizer steps that each replayable function makes.
        written: keys of pieces that replayable functions write before their gate.
    """

    twins: Ranks
    manifest: Manifest
    steps: int
    last_value: bytes | None
    gates: dict[str, int]
    written: list[str]


class Stripe(msgspec.Struct, frozen=True):
    """One survivor's part of a block: of which block, in which segment, and the digests of its chunks."""

    replicas: Ranks
    path: str
    digests: list[ChunkDigest]


class Publication(msgspec.Struct, frozen=True):
    """What one survivor publishes.

    Attributes:
        stripes: its parts of the blocks that a replacement needs.
        groups: its process groups, in order of creation.
        buckets: bucket order of each DDP module, None where DDP does not reorder.
        shared: where it speaks for all twins of a replacement.
    """

    stripes: list[Stripe]
    groups: list[GroupSignature]
    buckets: list[bytes | None]
    shared: Shared | None


def publish(
    run: Run, decision: Decision, rank: int, run_dir: str, last_value: bytes | None
) -> tuple[Publication, list[Segment]]:
    """Copy this rank's stripes into segments; those that are not reserved are returned. Blocks for the copy."""
    pieces = run.inventory.pieces()
    buckets = run.bucket_orders()
    stripes, segments = [], []
    for ranks, block in blocks(pieces).items():
        if not any(_in(ranks, lost) for lost in decision.pending):
            continue
        layout = _layout(block, ranks, decision.sources)
        stripe = layout.stripes[rank]
        start = stripe[0].segment_offset if stripe else 0
        end = stripe[-1].segment_offset + stripe[-1].length if stripe else 0
        segment = _reserved(run, run_dir, ranks, layout.segment_bytes)
        if segment is None:
            name = f"{_name(ranks)}-{decision.generation}"
            segment = Segment.share(Path(run_dir), name, layout.segment_bytes, start, end - start)
            segments.append(segment)
        stripes.append(Stripe(ranks, str(segment.path), publish_stripe(block, layout, rank, segment)))
    own = twins(pieces)
    speaks = rank == min(source for source in decision.sources if _in(own, source))
    wanted = speaks and any(_in(own, lost) for lost in decision.pending)
    common = run.shared(own, last_value) if wanted else None
    return Publication(stripes, run.signature(), buckets, common), segments


def blocks(pieces: Sequence[Piece]) -> dict[Ranks, list[Piece]]:
    """The pieces by the ranks that hold them, in an order that is the same on all these ranks."""
    found: dict[Ranks, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.info.replicas, []).append(piece)
    return found


def twins(pieces: Sequence[Piece]) -> Ranks:
    """The ranks that hold all of these pieces."""
    limited = [set(ranks) for ranks in blocks(pieces) if ranks]
    return tuple(sorted(set.intersection(*limited))) if limited else EVERYBODY


def _in(ranks: Ranks, rank: int) -> bool:
    return ranks == EVERYBODY or rank in ranks


def _layout(block: Sequence[Piece], ranks: Ranks, sources: Sequence[int]) -> Plan:
    """Which of the live ranks that hold a block sends what. StateMismatchError if none lives."""
    live = [rank for rank in sources if _in(ranks, rank)]
    layout = plan([PieceSize(piece.info.nbytes) for piece in block], live)
    if layout.unsourced:
        raise StateMismatchError(f"no survivor holds {block[layout.unsourced[0]].key}")
    return layout


def _name(ranks: Ranks) -> str:
    """A file name for a block."""
    if ranks == EVERYBODY:
        return RESERVED
    return f"{RESERVED}-{hashlib.blake2s(repr(ranks).encode(), digest_size=8).hexdigest()}"


def reserve(run: Run, run_dir: str, rank: int, count: int) -> None:
    """Make this rank's part of the pages that a recovery needs, and map its blocks, up to RESERVE_LIMIT.

    ``count``: ranks on this node; they are taken to hold as much as this one.
    """
    pieces = run.inventory.pieces()
    room, held = os.statvfs(run_dir), blocks(pieces)
    everybody = range(int(os.environ["WORLD_SIZE"]))
    layouts = {ranks: _layout(block, ranks, ranks or everybody) for ranks, block in held.items()}
    share = sum(layout.segment_bytes / len(ranks or everybody) for ranks, layout in layouts.items())
    limit = min(RESERVE_LIMIT, room.f_bavail * room.f_frsize // 4)
    _write_expected(Path(run_dir), rank, pieces)
    for ranks, layout in layouts.items():
        if not layout.segment_bytes or share * count > limit:
            continue
        holders = ranks or tuple(everybody)
        at = holders.index(rank)
        low = layout.segment_bytes * at // len(holders)
        high = layout.segment_bytes * (at + 1) // len(holders)
        name = _name(ranks)
        run.reserved[name] = Segment.share(Path(run_dir), name, layout.segment_bytes, low, high - low)
        run.reserved[name].populate(write=True)


def _write_expected(run_dir: Path, rank: int, pieces: list[Piece]) -> None:
    path = run_dir / f"{EXPECTED}-{rank}"
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(_expected(pieces)))
    partial.replace(path)


def _expected(pieces: list[Piece]) -> tuple[int, int]:
    """Bytes that a replacement makes itself, and that its script takes: a gradient and a place in a bucket each."""
    made = arena.size_of(piece.info for piece in pieces if piece.info.role in MADE)
    script = arena.size_of(piece.info for piece in pieces if piece.info.role not in MADE)
    return made, script + 2 * arena.size_of(piece.info for piece in pieces if piece.tensor.requires_grad)


def expect(run_dir: str, rank: int) -> None:
    """In a replacement, before its script: get ready, beside, what the transfer and the first step need."""
    path = Path(run_dir) / f"{EXPECTED}-{rank}"
    if path.exists():
        make_pages = arena.prepare(*msgspec.json.decode(path.read_bytes(), type=tuple[int, int]))
        threading.Thread(
            target=_get_ready, args=(make_pages,), name="checkpointless-ready", daemon=True
        ).start()


def _get_ready(make_pages: Callable[[], None]) -> None:
    digest.get_ready()
    make_pages()


def _reserved(run: Run, run_dir: str, ranks: Ranks, nbytes: int) -> Segment | None:
    """The reserved memory, if it is there and large enough; the same answer on all ranks of the node."""
    name = _name(ranks)
    path = Path(run_dir) / name
    if not path.exists() or path.stat().st_size < nbytes:
        return None
    if name not in run.reserved:  # once a replacement, which came after the first step
        run.reserved[name] = Segment.open(path, path.stat().st_size)
    return run.reserved[name]


def shared(publications: dict[int, Publication], rank: int) -> Shared:
    """What a twin of this rank says. Raises StateMismatchError if none lives."""
    for publication in publications.values():
        if publication.shared is not None and _in(publication.shared.twins, rank):
            return publication.shared
    raise StateMismatchError(f"no survivor holds all state that rank {rank} held")


def bucket_orders(publications: dict[int, Publication], twins: Ranks) -> list[bytes | None]:
    """The order on which all twins agree. Raises StateMismatchError if they do not."""
    orders = {rank: found.buckets for rank, found in publications.items() if _in(twins, rank)}
    lowest = min(orders)
    for rank, buckets in orders.items():
        if buckets != orders[lowest]:
            raise StateMismatchError(
                f"DDP's buckets on rank {rank} are in another order than on rank {lowest}"
            )
    return orders[lowest]


def receive(
    run: Run, decision: Decision, publications: dict[int, Publication], common: Shared
) -> tuple[int, float]:
    """Fill this replacement's state from the segments; bytes, and seconds in which they were copied and verified."""
    run.inventory.adopt(common.manifest)
    moved, seconds = 0, 0.0
    for ranks, block in blocks(run.inventory.pieces()).items():
        layout = _layout(block, ranks, decision.sources)
        parts = {rank: _stripe(publications[rank], ranks) for rank in layout.stripes}
        paths = {part.path for part in parts.values()}
        if len(paths) != 1:
            raise StateMismatchError(f"the survivors published in different places: {sorted(paths)}")
        segment = Segment.open(Path(paths.pop()), layout.segment_bytes)
        receiver = Receiver(block, layout, segment)
        for rank, part in parts.items():
            receiver.receive(rank, part.digests)
        report = receiver.finish()
        moved, seconds = moved + report.nbytes, seconds + report.seconds
        segment.close()
    run.inventory.load_meta(common.manifest)
    return moved, seconds


def _stripe(publication: Publication, ranks: Ranks) -> Stripe:
    for stripe in publication.stripes:
        if stripe.replicas == ranks:
            return stripe
    raise StateMismatchError(f"a survivor does not hold what ranks {list(ranks)} should share with it")
