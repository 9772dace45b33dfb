"""What survivors publish for replacements, and how a replacement receives it, on one node through shared memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
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
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver
from checkpointless_elastic.state.transfer import publish as publish_stripe

if TYPE_CHECKING:
    from checkpointless_elastic.worker.run import Run


RESERVED = "state"
EXPECTED = "expected"
"""File that says how much memory a replacement will need."""
RESERVE_LIMIT = 1 << 30
"""Bytes of state up to which its shared memory is kept from the first step on: making its pages when a rank is lost
would take time from the replacement. It is one more copy of the state per node."""


class Shared(msgspec.Struct, frozen=True):
    """What is the same on all survivors, and what they are compared by; the lowest of them publishes it.

    Attributes:
        manifest: description of all pieces, and state that is not a tensor.
        steps: committed training steps.
        last_value: encoded return value of the last committed call.
        gates: optimizer steps that each replayable function makes.
        written: keys of pieces that replayable functions write before their gate.
        groups: process groups of the lowest survivor in order of creation.
    """

    manifest: Manifest
    steps: int
    last_value: bytes | None
    gates: dict[str, int]
    written: list[str]
    groups: list[GroupSignature]


class Publication(msgspec.Struct, frozen=True):
    """One survivor's part: where its stripe is, its digests, and from the lowest survivor what all share.

    ``buckets``: bucket order of each DDP module, None where DDP does not reorder.
    """

    path: str
    digests: list[ChunkDigest]
    buckets: list[bytes | None]
    shared: Shared | None


def publish(
    run: Run, decision: Decision, rank: int, run_dir: str, last_value: bytes | None
) -> tuple[Publication, Segment]:
    """Copy this rank's stripe into the generation's segment. Blocks for the copy."""
    leader = rank == min(decision.sources)
    buckets = run.bucket_orders()
    pieces = run.inventory.pieces()
    layout = _plan(pieces, decision)
    stripe = layout.stripes[rank]
    start = stripe[0].segment_offset if stripe else 0
    end = stripe[-1].segment_offset + stripe[-1].length if stripe else 0
    segment = _reserved(run, run_dir, layout.segment_bytes)
    if segment is None:
        segment = Segment.share(Path(run_dir), _name(decision), layout.segment_bytes, start, end - start)
    digests = publish_stripe(pieces, layout, rank, segment)
    common = run.shared(last_value) if leader else None
    return Publication(str(segment.path), digests, buckets, common), segment


def reserve(run: Run, run_dir: str, index: int, count: int) -> None:
    """Make part ``index`` of ``count`` of the pages that a recovery needs, and map all, up to RESERVE_LIMIT."""
    nbytes = plan([PieceSize(piece.info.nbytes) for piece in run.inventory.pieces()], [0]).segment_bytes
    room = os.statvfs(run_dir)
    if not 0 < nbytes <= min(RESERVE_LIMIT, room.f_bavail * room.f_frsize // 4):
        return
    low, high = nbytes * index // count, nbytes * (index + 1) // count
    run.reserved = Segment.share(Path(run_dir), RESERVED, nbytes, low, high - low)
    run.reserved.populate(write=True)
    if index == 0:
        partial = Path(run_dir) / f"{EXPECTED}.partial"
        partial.write_bytes(msgspec.json.encode(_expected(run.inventory.pieces())))
        partial.replace(Path(run_dir) / EXPECTED)


def _expected(pieces: list[Piece]) -> tuple[int, int]:
    """Bytes that a replacement makes itself, and that its script takes: a gradient and a place in a bucket each."""
    made = arena.size_of(piece.info for piece in pieces if piece.info.role in MADE)
    script = arena.size_of(piece.info for piece in pieces if piece.info.role not in MADE)
    return made, script + 2 * arena.size_of(piece.info for piece in pieces if piece.tensor.requires_grad)


def expect(run_dir: str) -> None:
    """In a replacement, before its script: get ready, beside, what the transfer and the first step need."""
    path = Path(run_dir) / EXPECTED
    if path.exists():
        make_pages = arena.prepare(*msgspec.json.decode(path.read_bytes(), type=tuple[int, int]))
        threading.Thread(
            target=_get_ready, args=(make_pages,), name="checkpointless-ready", daemon=True
        ).start()


def _get_ready(make_pages: Callable[[], None]) -> None:
    digest.get_ready()
    make_pages()


def _reserved(run: Run, run_dir: str, nbytes: int) -> Segment | None:
    """The reserved memory, if it is there and large enough; the same answer on all ranks of the node."""
    path = Path(run_dir) / RESERVED
    if not path.exists() or path.stat().st_size < nbytes:
        return None
    if run.reserved is None:  # once a replacement, which came after the first step
        run.reserved = Segment.open(path, path.stat().st_size)
    return run.reserved


def shared(publications: dict[int, Publication]) -> Shared:
    """What the lowest survivor said for all. Raises StateMismatchError if nobody did."""
    for rank in sorted(publications):
        found = publications[rank].shared
        if found is not None:
            return found
    raise StateMismatchError("no survivor published the description of the state")


def bucket_orders(publications: dict[int, Publication]) -> list[bytes | None]:
    """The order on which all survivors agree. Raises StateMismatchError if they do not."""
    lowest = publications[min(publications)].buckets
    for rank, publication in publications.items():
        if publication.buckets != lowest:
            raise StateMismatchError(
                f"DDP's buckets on rank {rank} are in another order than on rank {min(publications)}"
            )
    return lowest


def receive(run: Run, decision: Decision, publications: dict[int, Publication], run_dir: str) -> int:
    """Fill this replacement's state from the segment, verified; bytes that were copied."""
    common = shared(publications)
    run.inventory.adopt(common.manifest)
    pieces = run.inventory.pieces()
    layout = _plan(pieces, decision)
    paths = {publication.path for publication in publications.values()}
    if len(paths) != 1:
        raise StateMismatchError(f"the survivors published in different places: {sorted(paths)}")
    segment = Segment.open(Path(paths.pop()), layout.segment_bytes)
    receiver = Receiver(pieces, layout, segment)
    for rank in layout.stripes:
        receiver.receive(rank, publications[rank].digests)
    moved = receiver.finish().nbytes
    segment.close()
    run.inventory.load_meta(common.manifest)
    return moved


def _plan(pieces: list[Piece], decision: Decision) -> Plan:
    layout = plan([PieceSize(piece.info.nbytes) for piece in pieces], decision.sources)
    if layout.unsourced:
        key = pieces[layout.unsourced[0]].key
        raise StateMismatchError(f"no survivor holds {key}")
    return layout


def _name(decision: Decision) -> str:
    return f"state-{decision.generation}"
