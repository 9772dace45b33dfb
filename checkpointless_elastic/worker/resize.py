"""A worker's part when the number of ranks changes, see `protocol.resize`: it leaves its state behind, and takes it up.

State is left in a directory of the node's shared memory: what all ranks hold once per node, and for each worker what is
its own, as it was when its last replayable call had returned. From there all ranks go on alike: what they did since is
done again, by all of them. A rank without a state of its own (its worker was lost, or its node has just come) gets the
common state from the others, and the rest (position in the data, random state, statistics of BatchNorm) as the lowest
rank that speaks has it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from checkpointless_elastic import run_dir as directories
from checkpointless_elastic.data.cursor import Cursor, Frame
from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.state.pieces import Manifest, Piece, PieceInfo
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import Ranks
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.state.transfer import publish as publish_part
from checkpointless_elastic.state.transfer import restore
from checkpointless_elastic.worker.blocks import Block, Stripe, block_name, blocks, holds, layout_of, twins
from checkpointless_elastic.worker.mirror import Entry
from checkpointless_elastic.worker.packing import pack, unpack
from checkpointless_elastic.worker.private import At, PrivateState

if TYPE_CHECKING:
    from checkpointless_elastic.worker.exchange import Here
    from checkpointless_elastic.worker.run import Run

__all__ = ["Own", "keep", "ready_to_go_on", "take_up"]

logger = logging.getLogger(__name__)


class Own(NamedTuple):
    """A rank's private state of a step, encoded in the moment that it is of, since a cursor changes.

    Attributes:
        step: at which it goes on.
        content: the state; or that when the rank was ready, from which it follows.
        ready: whether it is that.
        value: then, what the call has returned.
    """

    step: int
    content: Content
    ready: bool = False
    value: bytes | None = None

    def whole(self) -> Content:
        """The state, as it was when the last call had returned."""
        if not self.ready:
            return self.content
        before = unpack(self.content, PrivateState)
        before.cursor.commit(self.value, before.ready_rng)
        return pack(PrivateState(self.step, At.BETWEEN, before.cursor, tensors=before.ready_tensors))


# ---- leaving it behind


def keep(run: Run, decision: Decision, here: Here, own: Own | None, last_value: bytes | None) -> bool:
    """Leave the state of the decision's step behind. Blocks for the copy.

    False: not what is this rank's own, since it is a replacement and no call has returned in it yet. Raises
    StateMismatchError if the node's memory has no room.
    """
    whole = own is not None and own.step == decision.step
    blob, parts = own.whole() if own is not None and whole else Content(b"", {})
    directory = Path(directories.kept(here.run_dir))
    directory.mkdir(mode=0o700, exist_ok=True)
    pieces = run.inventory.pieces()
    try:
        stripes = [
            _copy(directory, block, held, decision.step)
            for block, held in blocks(pieces).items()
            if _lead(block, decision, here) == here.rank
        ]
        shared = run.shared(twins(pieces), last_value)
        entry = Entry(decision.step, stripes, shared, [], blob, dict(parts), decision.generation)
        _write(directory / _name(here), msgspec.msgpack.encode(entry))
    except OSError as error:
        raise StateMismatchError(
            f"the state cannot be kept for another number of ranks: {error}. Enlarge the shared memory"
        ) from error
    return whole


def _lead(block: Block, decision: Decision, here: Here) -> int:
    """Of the ranks of this node that hold a block and live, the one that keeps it."""
    near = [rank for rank in decision.sources if here.nodes.of(rank) == here.nodes.of(here.rank)]
    return min(rank for rank in near if holds(block.ranks, rank))


def _copy(directory: Path, block: Block, held: list[Piece], step: int) -> Stripe:
    layout = layout_of(held, [_KEEPER])
    name = f"{block_name(block)}-{step}"
    segment = Segment.share(directory, name, layout.segment_bytes, 0, layout.segment_bytes)
    stripe = Stripe(block, str(segment.path), publish_part(held, layout, _KEEPER, segment))
    segment.close()
    return stripe


def _name(here: Here) -> str:
    """A rank's number changes, its place on its node does not."""
    return f"rank-{here.rank - here.nodes.bases[here.nodes.of(here.rank)]}"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)


# ---- taking it up


def take_up(run: Run, step: int, here: Here) -> Entry:
    """Fill the state from what was left behind on this node. Blocks for the copy.

    Raises StateMismatchError if it is not there, or is not that of this script.
    """
    directory = Path(directories.kept(here.run_dir))
    entry = _read(directory / _name(here), step)
    stripes = [stripe for path in sorted(directory.glob("rank-*")) for stripe in _read(path, step).stripes]
    known = translation(run.inventory.pieces(), entry.shared.manifest)
    manifest = known.manifest
    run.inventory.adopt(manifest)
    for block, held in blocks(run.inventory.pieces()).items():
        old = Block(known.claims.get(block.ranks, block.ranks), block.device)
        _fill(held, next((stripe for stripe in stripes if stripe.block == old), None))
    run.inventory.load_meta(manifest)
    return entry


class Translation(NamedTuple):
    """What was kept, in the words of this run. ``claims``: by the ranks that hold a piece now, those that held it."""

    manifest: Manifest
    claims: dict[Ranks, Ranks]


def translation(pieces: list[Piece], kept: Manifest) -> Translation:
    """Ranks and meshes have other numbers now: how those that were kept are called is read from parameters.

    Raises StateMismatchError if what one of them was called has two names now, or the other way round.
    """
    now = {piece.key: piece.info for piece in pieces}
    claims: dict[Ranks, Ranks] = {}
    meshes: dict[str, str] = {}
    for info in kept.pieces:
        here = now.get(info.key)
        if here is None:
            continue
        if claims.setdefault(info.replicas, here.replicas) != here.replicas:
            raise StateMismatchError(
                f"{info.key} is shared in another way than with the number of ranks before"
            )
        if info.sharding is not None and here.sharding is not None:
            meshes[info.sharding.mesh] = here.sharding.mesh
    back = {new: old for old, new in claims.items()}
    if len(back) != len(claims):
        raise StateMismatchError("parts of the state that differed by their ranks do not any more")
    return Translation(
        Manifest(tuple(_renamed(info, claims, meshes) for info in kept.pieces), kept.meta), back
    )


def _renamed(info: PieceInfo, claims: dict[Ranks, Ranks], meshes: dict[str, str]) -> PieceInfo:
    known = info.sharding
    if known is not None:
        known = msgspec.structs.replace(known, mesh=meshes.get(known.mesh, known.mesh))
    return msgspec.structs.replace(info, replicas=claims.get(info.replicas, info.replicas), sharding=known)


def _fill(held: list[Piece], stripe: Stripe | None) -> None:
    if stripe is None:
        raise StateMismatchError(f"{held[0].key} was not kept for another number of ranks")
    layout = layout_of(held, [_KEEPER])
    with Segment.open(Path(stripe.path), layout.segment_bytes) as segment:
        restore(held, layout, segment, stripe.digests)


def _read(path: Path, step: int) -> Entry:
    if not path.exists():
        raise StateMismatchError(f"no state was kept in {path}")
    entry = msgspec.msgpack.decode(path.read_bytes(), type=Entry)
    if entry.step != step:
        raise StateMismatchError(f"the state kept in {path} is of step {entry.step}, and not of {step}")
    return entry


def ready_to_go_on(blob: bytes, parts: dict[int, bytes], rank: int) -> PrivateState:
    """A private state that was kept, for a run by another number of ranks: what is left of a pass is dealt anew."""
    state = unpack(Content(blob, parts), PrivateState)
    for frame in _frames(state.cursor):
        frame.outside, frame.setup = [], 0  # these are done again, by all
        if frame.kind != "batches" or frame.compact or frame.position < 0:
            continue
        if frame.dealing is not None:
            frame.deals = [*frame.deals, (*frame.dealing, -1 if frame.finished else frame.position + 1)]
        elif not frame.finished and rank == 0:
            logger.warning(
                "The number of ranks has changed. A loop of run.batches goes on at item %d of its loader on each rank: "
                "what is left is dealt anew only for a DataLoader with torch's DistributedSampler and BatchSampler.",
                frame.position + 1,
            )
    return state


def _frames(cursor: Cursor) -> Iterator[Frame]:
    frames = [*cursor.stack]
    while frames:
        frame = frames.pop()
        yield frame
        frames += frame.children


_KEEPER = 0
"""A block is kept by one rank, whatever its number."""
