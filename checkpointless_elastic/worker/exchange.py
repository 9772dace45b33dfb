"""What survivors publish for replacements, and how a replacement receives it.

Pieces with the same replicas on the same kind of device travel together: each such *block* has a segment of its own,
which the live ranks of the node that hold it fill in stripes, or is read where it is (CUDA IPC). A node on which none
lives gets it over the network (`routes`, `network`). What is not a tensor comes from a *twin*: a rank that holds all
that the lost rank held.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.groups.patch import group_count
from checkpointless_elastic.groups.spec import GroupSignature
from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.state import arena, device
from checkpointless_elastic.state.pieces import MADE, Piece
from checkpointless_elastic.state.plan import Plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import Ranks
from checkpointless_elastic.state.transfer import Receiver, TransferReport, in_segment, restore, vouch
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
from checkpointless_elastic.worker.network import Network, send
from checkpointless_elastic.worker.network import receive as receive_remote
from checkpointless_elastic.worker.routes import Route, routes

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
        group_count: see `groups.patch`.
        buckets: bucket order of each DDP module, None where DDP does not reorder.
        shared: where it speaks for all twins of a replacement.
        own, parts: beside it where the number of ranks changes, the private state of this rank, see `resize.Own`.
    """

    stripes: list[Stripe]
    groups: list[GroupSignature]
    group_count: int
    buckets: list[bytes | None]
    shared: Shared | None
    own: bytes = b""
    parts: dict[int, bytes] = {}


publication_of = msgspec.msgpack.Decoder(Publication).decode


class Here(NamedTuple):
    """Where this rank is.

    Attributes:
        rank: its number.
        nodes: which ranks are on which node.
        run_dir: its node's own directory in shared memory.
    """

    rank: int
    nodes: Nodes
    run_dir: str


def publish(
    run: Run, decision: Decision, here: Here, last_value: bytes | None, afresh: bool = False
) -> tuple[Publication, list[Segment]]:
    """Copy this rank's stripes into segments; those that are not reserved are returned. Blocks for the copy.

    ``afresh``: all ranks run the script anew, so DDP has not put its buckets in order anywhere.
    """
    pieces, rank = run.inventory.pieces(), here.rank
    buckets = [] if afresh else run.bucket_orders()
    stripes: list[Stripe] = []
    segments: list[Segment] = []
    for block, held in blocks(pieces).items():
        for route in routes(block, decision, here.nodes):
            if rank in route.sources:
                stripes.append(_publish(run, here, route, held, decision.generation, segments))
    own = twins(pieces)
    speaks = rank == min(source for source in decision.sources if holds(own, source))
    wanted = speaks and any(holds(own, lost) for lost in decision.pending)
    common = run.shared(own, last_value) if wanted else None
    return Publication(stripes, run.signature(), group_count(), buckets, common), segments


def _publish(
    run: Run, here: Here, route: Route, held: list[Piece], generation: int, segments: list[Segment]
) -> Stripe:
    """One stripe, where its readers find it; a segment that is not reserved is added to the list."""
    layout, rank, block = layout_of(held, route.sources), here.rank, route.block
    if route.remote:
        return Stripe(block, "", vouch(held, layout, rank), node=route.node)
    if block.device == "cuda" and device.shareable(held):
        return Stripe(block, "", vouch(held, layout, rank), device.share(held), route.node)
    segment = _reserved(run, here.run_dir, block, layout.segment_bytes)
    if segment is None:
        segment = _own_part(here.run_dir, f"{block_name(block)}-{generation}", layout, rank)
        segments.append(segment)
    return Stripe(block, str(segment.path), publish_stripe(held, layout, rank, segment), node=route.node)


def send_state(run: Run, decision: Decision, here: Here, network: Network) -> None:
    """Send what this rank has published for other nodes. Blocks until the lost ranks there have it.

    Raises RuntimeError when one of them is lost, `groups.Superseded` once a newer generation is open.
    """
    if all(here.nodes.of(rank) == here.nodes.of(here.rank) for rank in decision.pending):
        return
    pieces = blocks(run.inventory.pieces())
    send(network, _routes(pieces, decision, here), pieces)


def _routes(pieces: Iterable[Block], decision: Decision, here: Here) -> list[Route]:
    """All routes that this rank is part of."""
    found = (route for block in pieces for route in routes(block, decision, here.nodes))
    return [route for route in found if here.rank in route.members]


def _own_part(run_dir: str, name: str, layout: Plan, rank: int) -> Segment:
    """A segment of which this rank makes the pages of its own stripe."""
    stripe = layout.stripes[rank]
    start = stripe[0].segment_offset if stripe else 0
    end = stripe[-1].segment_offset + stripe[-1].length if stripe else 0
    return Segment.share(Path(run_dir), name, layout.segment_bytes, start, end - start)


def reserve(run: Run, here: Here, count: int) -> None:
    """Make this rank's part of the pages that a recovery needs, and map its blocks, up to RESERVE_LIMIT.

    ``count``: ranks on this node; they are taken to hold as much as this one.
    """
    pieces, directory = run.inventory.pieces(), Path(here.run_dir)
    room, everybody = os.statvfs(directory), tuple(range(int(os.environ["WORLD_SIZE"])))
    near = [rank for rank in everybody if here.nodes.of(rank) == here.nodes.of(here.rank)]
    holders, sizes = {}, {}
    for block, held in blocks(pieces).items():
        if block.device != "cuda":
            holders[block] = [rank for rank in near if holds(block.ranks, rank)]
            sizes[block] = layout_of(held, holders[block]).segment_bytes
    share = sum(nbytes / len(holders[block]) for block, nbytes in sizes.items())
    limit = min(RESERVE_LIMIT, room.f_bavail * room.f_frsize // 4)
    reserved = [block for block, nbytes in sizes.items() if nbytes and share * count <= limit]
    _write_expected(directory, here.rank, pieces, list(map(block_name, reserved)))
    for block in reserved:
        nbytes, count, at = sizes[block], len(holders[block]), holders[block].index(here.rank)
        name = block_name(block)
        low, high = nbytes * at // count, nbytes * (at + 1) // count
        run.reserved[name] = Segment.share(directory, name, nbytes, low, high - low)
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


def forget() -> None:
    """The script is run again: nothing is to be received."""
    _mapped.clear()


def _get_ready(make_pages: Callable[[], None], segments: list[Segment]) -> None:
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
    run: Run,
    decision: Decision,
    publications: dict[int, Publication],
    common: Shared,
    here: Here,
    network: Network,
    kept: list[Segment],
) -> tuple[int, float]:
    """Fill this replacement's state from live replicas, else from mirrors.

    Gives the bytes, and the seconds in which they were copied and verified. Segments in which other ranks of the node
    may read are added to `kept`. Raises RuntimeError when a rank that sends is lost, `groups.Superseded` once a newer
    generation is open.
    """
    run.inventory.adopt(common.manifest)
    pieces = blocks(run.inventory.pieces())
    found = _routes(pieces, decision, here)
    ways = {route.block: route for route in found}
    parts = {block: _parts(block, ways.get(block), publications, decision.step, here) for block in pieces}
    started = time.perf_counter()
    arrived, receivers = _over_network(run, found, pieces, parts, here, network, kept)
    moved, seconds = 0, time.perf_counter() - started
    for block, held in pieces.items():
        done = receivers.get(block)
        layout = layout_of(held, list(parts[block]))
        report = done.finish() if done else _fill(held, layout, parts[block], arrived.get(block))
        moved, seconds = moved + report.nbytes, seconds + report.seconds
    run.inventory.load_meta(common.manifest)
    return moved, seconds


def _over_network(
    run: Run,
    found: list[Route],
    pieces: dict[Block, list[Piece]],
    parts: dict[Block, dict[int, Stripe]],
    here: Here,
    network: Network,
    kept: list[Segment],
) -> tuple[dict[Block, Segment], dict[Block, Receiver]]:
    """What comes over the network for this node, and, where this rank receives it, who has copied and verified it."""
    rooms, receivers, takers = {}, {}, {}
    with ExitStack() as stack:
        for block in [route.block for route in found if route.remote and route.receiver == here.rank]:
            layout = layout_of(pieces[block], list(parts[block]))
            rooms[block] = _room(run, here, kept, block, layout.segment_bytes)
            receivers[block] = Receiver(pieces[block], layout, in_segment(rooms[block]))
            digests = [item for part in parts[block].values() for item in part.digests]
            takers[block] = stack.enter_context(receivers[block].taking(digests))
        arrived = receive_remote(
            network, found, pieces, rooms, lambda block, source, chunk: takers[block](source, chunk)
        )
    return arrived, receivers


def _parts(
    block: Block, route: Route | None, publications: dict[int, Publication], step: int, here: Here
) -> dict[int, Stripe]:
    """By rank, what it says of its part of a block; without a live rank, what the keeper of its mirror has said."""
    if route is not None:
        return {
            rank: stripe_of(publications[rank].stripes, block, f"rank {rank}", route.node)
            for rank in route.sources
        }
    keeper = mirror.lead(block, here.nodes, here.rank)
    return {keeper: stripe_of(mirror.find(here.run_dir, keeper, step).stripes, block, f"rank {keeper}")}


def _room(run: Run, here: Here, kept: list[Segment], block: Block, nbytes: int) -> Segment:
    """Memory for what comes over the network. Nobody reads an earlier content: all lost ranks have come anew."""
    segment = _reserved(run, here.run_dir, block, nbytes)
    if segment is None:
        segment = Segment.share(Path(here.run_dir), f"{block_name(block)}-received", nbytes, 0, nbytes)
        kept.append(segment)
    return segment


def _fill(
    pieces: list[Piece], layout: Plan, parts: dict[int, Stripe], arrived: Segment | None
) -> TransferReport:
    """Copy one block: what has arrived over the network, or from one segment, or from the devices of the sources."""
    digests = [item for part in parts.values() for item in part.digests]
    if arrived is not None:
        return restore(pieces, layout, arrived, digests)
    paths = {part.path for part in parts.values()}
    if len(paths) != 1:
        raise StateMismatchError(f"the survivors published in different places: {sorted(paths)}")
    path = paths.pop()
    if path in _mapped:
        return restore(pieces, layout, _mapped[path], digests)
    if path:
        with Segment.open(Path(path), layout.segment_bytes) as segment:
            return restore(pieces, layout, segment, digests)
    opened = {rank: device.Opened(part.memory) for rank, part in parts.items()}
    receiver = Receiver(pieces, layout, lambda source, chunk: opened[source].read(chunk))
    receiver.receive(digests)
    return receiver.finish()
