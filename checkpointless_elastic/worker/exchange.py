"""What survivors publish for replacements, and how a replacement receives it, on one node through shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpointless_elastic.errors import ScriptMismatchError, StateMismatchError
from checkpointless_elastic.groups.registry import GroupSignature
from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.state.pieces import Manifest, Piece
from checkpointless_elastic.state.plan import PieceSize, Plan, plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver
from checkpointless_elastic.state.transfer import publish as publish_stripe

if TYPE_CHECKING:
    from checkpointless_elastic.worker.run import Run


class Shared(msgspec.Struct, frozen=True):
    """What is the same on all survivors; the lowest of them publishes it.

    Attributes:
        manifest: description of all pieces, and state that is not a tensor.
        steps: committed training steps.
        last_value: encoded return value of the last committed call.
        gates: optimizer steps that each replayable function makes.
        written: keys of pieces that replayable functions write before their gate.
        buckets: bucket order of each DDP module, None where DDP does not reorder.
        groups: process groups in order of creation.
    """

    manifest: Manifest
    steps: int
    last_value: bytes | None
    gates: dict[str, int]
    written: list[str]
    buckets: list[bytes | None]
    groups: list[GroupSignature]


class Publication(msgspec.Struct, frozen=True):
    """One survivor's part: where its stripe is, its digests, and from the lowest survivor what all share."""

    path: str
    digests: list[ChunkDigest]
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
    segment = Segment.share(Path(run_dir), _name(decision), layout.segment_bytes, start, end - start)
    digests = publish_stripe(pieces, layout, rank, segment)
    common = run.shared(buckets, last_value) if leader else None
    return Publication(str(segment.path), digests, common), segment


def shared(publications: dict[int, Publication]) -> Shared:
    """What the lowest survivor said for all. Raises StateMismatchError if nobody did."""
    for rank in sorted(publications):
        found = publications[rank].shared
        if found is not None:
            return found
    raise StateMismatchError("no survivor published the description of the state")


def receive(run: Run, decision: Decision, publications: dict[int, Publication], run_dir: str) -> int:
    """Fill this replacement's state from the segment, verified; bytes that were copied."""
    common = shared(publications)
    _compare_groups(common.groups, run.signature())
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


def _compare_groups(survivors: list[GroupSignature], own: list[GroupSignature]) -> None:
    for number, (theirs, mine) in enumerate(zip(survivors, own, strict=False)):
        if theirs != mine:
            raise ScriptMismatchError(f"process group {number} is {mine} in the replacement and {theirs} in a survivor")
    if len(survivors) != len(own):
        raise ScriptMismatchError(
            f"the replacement has made {len(own)} process groups by its first step and the survivors {len(survivors)}"
        )
