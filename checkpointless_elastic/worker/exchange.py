"""What survivors publish for replacements, and how a replacement receives it, on one node.

Pieces with the same replicas on the same kind of device travel together: each such *block* has a segment of its own,
which the live ranks that hold it fill in stripes, or is read where it is (CUDA IPC). What is not a tensor comes from a
*twin*: a rank that holds all that the lost rank held.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.groups.spec import GroupSignature
from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.state import arena, device, digest
from checkpointless_elastic.state.pieces import MADE, Piece
from checkpointless_elastic.state.plan import Plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import Ranks
from checkpointless_elastic.state.transfer import Receiver, TransferReport, in_segment, vouch
from checkpointless_elastic.state.transfer import publish as publish_stripe
from checkpointless_elastic.worker import mirror
from checkpointless_elastic.worker.blocks import (
    Block,
    Shared,
    Stripe,
    block_name,
    blocks,
    holds,
    layout_of,
    stripe_of,
    twins,
)

if TYPE_CHECKING:
    from checkpointless_elastic.worker.run import Run


EXPECTED = "expected"
"""File that says how much memory the replacement of a rank will need."""
RESERVE_LIMIT = 1 << 30
"""Bytes of state on this node up to which shared memory for it is kept from the first step on: making its pages when a
rank is lost would take time from the replacement. It is one more copy of the state per node."""

_STRETCH = 4 << 20  # mapped in one go, so that the script can run in between
_mapped: dict[str, Segment] = {}  # in a replacement, by path: reserved memory, mapped ahead


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
    for block, held in blocks(pieces).items():
        if not any(holds(block.ranks, lost) for lost in decision.pending):
            continue
        layout = _layout(held, block, decision.sources)
        if block.device == "cuda" and device.shareable(held):
            stripes.append(Stripe(block, "", vouch(held, layout, rank), device.share(held)))
            continue
        segment = _reserved(run, run_dir, block, layout.segment_bytes)
        if segment is None:
            segment = _own_part(run_dir, f"{block_name(block)}-{decision.generation}", layout, rank)
            segments.append(segment)
        stripes.append(Stripe(block, str(segment.path), publish_stripe(held, layout, rank, segment)))
    own = twins(pieces)
    speaks = rank == min(source for source in decision.sources if holds(own, source))
    wanted = speaks and any(holds(own, lost) for lost in decision.pending)
    common = run.shared(own, last_value) if wanted else None
    return Publication(stripes, run.signature(), buckets, common), segments


def _own_part(run_dir: str, name: str, layout: Plan, rank: int) -> Segment:
    """A segment of which this rank makes the pages of its own stripe."""
    stripe = layout.stripes[rank]
    start = stripe[0].segment_offset if stripe else 0
    end = stripe[-1].segment_offset + stripe[-1].length if stripe else 0
    return Segment.share(Path(run_dir), name, layout.segment_bytes, start, end - start)


def _layout(pieces: Sequence[Piece], block: Block, sources: Sequence[int]) -> Plan:
    """Which of the live ranks that hold a block sends what. StateMismatchError if none lives."""
    layout = layout_of(pieces, [rank for rank in sources if holds(block.ranks, rank)])
    if layout.unsourced:
        raise StateMismatchError(f"no survivor holds {pieces[layout.unsourced[0]].key}")
    return layout


def reserve(run: Run, run_dir: str, rank: int, count: int) -> None:
    """Make this rank's part of the pages that a recovery needs, and map its blocks, up to RESERVE_LIMIT.

    ``count``: ranks on this node; they are taken to hold as much as this one.
    """
    pieces = run.inventory.pieces()
    room, everybody = os.statvfs(run_dir), tuple(range(int(os.environ["WORLD_SIZE"])))
    layouts = {
        block: _layout(held, block, block.ranks or everybody)
        for block, held in blocks(pieces).items()
        if block.device != "cuda"
    }
    share = sum(layout.segment_bytes / len(block.ranks or everybody) for block, layout in layouts.items())
    limit = min(RESERVE_LIMIT, room.f_bavail * room.f_frsize // 4)
    reserved = [block for block, layout in layouts.items() if layout.segment_bytes and share * count <= limit]
    _write_expected(Path(run_dir), rank, pieces, list(map(block_name, reserved)))
    for block in reserved:
        layout = layouts[block]
        holders, name = block.ranks or everybody, block_name(block)
        at = holders.index(rank)
        low = layout.segment_bytes * at // len(holders)
        high = layout.segment_bytes * (at + 1) // len(holders)
        run.reserved[name] = Segment.share(Path(run_dir), name, layout.segment_bytes, low, high - low)
        run.reserved[name].populate(write=True)


def _write_expected(run_dir: Path, rank: int, pieces: list[Piece], names: list[str]) -> None:
    path = run_dir / f"{EXPECTED}-{rank}"
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode((*_expected(pieces), names)))
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
        made, script, names = msgspec.json.decode(path.read_bytes(), type=tuple[int, int, list[str]])
        segments = [path.with_name(name) for name in names if path.with_name(name).exists()]
        _mapped.update((str(one), Segment.open(one, one.stat().st_size)) for one in segments)
        arguments = (arena.prepare(made, script), list(_mapped.values()))
        threading.Thread(target=_get_ready, args=arguments, name="checkpointless-ready", daemon=True).start()


def _get_ready(make_pages: Callable[[], None], segments: list[Segment]) -> None:
    digest.get_ready()
    make_pages()
    for segment in segments:
        for offset in range(0, segment.nbytes, _STRETCH):
            segment.populate(offset, min(_STRETCH, segment.nbytes - offset))


def _reserved(run: Run, run_dir: str, block: Block, nbytes: int) -> Segment | None:
    """The reserved memory, if it is there and large enough; the same answer on all ranks of the node."""
    name = block_name(block)
    path = Path(run_dir) / name
    if not path.exists() or path.stat().st_size < nbytes:
        return None
    if name not in run.reserved:  # once a replacement, which came after the first step
        mapped = str(path) in _mapped
        run.reserved[name] = _mapped.pop(str(path)) if mapped else Segment.open(path, path.stat().st_size)
    return run.reserved[name]


def shared(publications: dict[int, Publication], rank: int) -> Shared | None:
    """What a twin of this rank says; None if none lives."""
    for publication in publications.values():
        if publication.shared is not None and holds(publication.shared.twins, rank):
            return publication.shared
    return None


def bucket_orders(publications: dict[int, Publication], twins: Ranks) -> list[bytes | None]:
    """The order on which all twins agree. Raises StateMismatchError if they do not."""
    orders = {rank: found.buckets for rank, found in publications.items() if holds(twins, rank)}
    lowest = min(orders)
    for rank, buckets in orders.items():
        if buckets != orders[lowest]:
            raise StateMismatchError(
                f"DDP's buckets on rank {rank} are in another order than on rank {lowest}"
            )
    return orders[lowest]


def receive(
    run: Run, decision: Decision, publications: dict[int, Publication], common: Shared, run_dir: str
) -> tuple[int, float]:
    """Fill this replacement's state from live replicas, else from mirrors.

    Gives the bytes, and the seconds in which they were copied and verified.
    """
    run.inventory.adopt(common.manifest)
    moved, seconds = 0, 0.0
    for block, held in blocks(run.inventory.pieces()).items():
        live = [rank for rank in decision.sources if holds(block.ranks, rank)]
        if live:
            found = {rank: publications[rank].stripes for rank in live}
        else:
            keeper = mirror.lead(block)
            found = {keeper: mirror.find(run_dir, keeper, decision.step).stripes}
        layout = layout_of(held, list(found))
        parts = {rank: stripe_of(stripes, block, f"rank {rank}") for rank, stripes in found.items()}
        report = _fill(held, layout, parts)
        moved, seconds = moved + report.nbytes, seconds + report.seconds
    run.inventory.load_meta(common.manifest)
    return moved, seconds


def _fill(pieces: list[Piece], layout: Plan, parts: dict[int, Stripe]) -> TransferReport:
    """Copy one block, from one segment or from the devices of the sources."""
    paths = {part.path for part in parts.values()}
    if len(paths) != 1:
        raise StateMismatchError(f"the survivors published in different places: {sorted(paths)}")
    path = paths.pop()
    if path in _mapped:
        return _receive(Receiver(pieces, layout, in_segment(_mapped[path])), parts)
    if path:
        with Segment.open(Path(path), layout.segment_bytes) as segment:
            return _receive(Receiver(pieces, layout, in_segment(segment)), parts)
    opened = {rank: device.Opened(part.memory) for rank, part in parts.items()}
    return _receive(Receiver(pieces, layout, lambda source, chunk: opened[source].read(chunk)), parts)


def _receive(receiver: Receiver, parts: dict[int, Stripe]) -> TransferReport:
    for rank, part in parts.items():
        receiver.receive(rank, part.digests)
    return receiver.finish()
