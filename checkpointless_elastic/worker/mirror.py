"""Mirrors: this rank's state in host memory that outlives it, for shards that no other rank holds.

At the start of every `mirror_every`-th step the state is copied into shared memory, beside the step: its tensors do not
change until the first optimizer step, which waits for the copy. What forward or backward may write is copied first. Two
buffers take turns, and a slot names those that are whole, so a copy that was cut short is never used. Each block is
kept by the lowest of the ranks of each node that hold it. With several nodes the agent sends each mirror that is whole
to the guardian of its node (`agent.mirrors`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.protocol.messages import Mirrored
from checkpointless_elastic.protocol.mirrors import is_due
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.state.pieces import STILL, Piece, carrier, make_tensor
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.slot import Content, Slot
from checkpointless_elastic.state.transfer import publish
from checkpointless_elastic.worker.blocks import Block, Shared, Stripe, block_name, blocks, layout_of, twins
from checkpointless_elastic.worker.packing import pack, unpack
from checkpointless_elastic.worker.private import PrivateState

if TYPE_CHECKING:
    from checkpointless_elastic.worker.run import Run
    from checkpointless_elastic.worker.session import Session

__all__ = ["Entry", "Mirror", "decode", "encode", "entries", "find", "lead", "newest", "path_of"]

logger = logging.getLogger(__name__)

_version = attrgetter("_version")


class Entry(msgspec.Struct, frozen=True):
    """A mirror that is whole.

    Attributes:
        step: the state is the one from which this step is computed.
        stripes: the blocks that this rank keeps, each with one source, this rank.
        shared: what a twin of this rank would publish.
        buckets: bucket order of each DDP module.
        private: the rank's private state, a blob.
        parts: what the blob names.
        begun: the generation in which the copy was begun.
    """

    step: int
    stripes: list[Stripe]
    shared: Shared
    buckets: list[bytes | None]
    private: bytes
    parts: dict[int, bytes]
    begun: int

    def private_state(self) -> PrivateState:
        """The private state of then."""
        return unpack(Content(self.private, self.parts), PrivateState)


encode: Callable[[Entry], bytes] = msgspec.msgpack.Encoder().encode
decode: Callable[[bytes], Entry] = msgspec.msgpack.Decoder(Entry).decode


def lead(block: Block, nodes: Nodes, rank: int) -> int:
    """The rank that keeps a block on the node of ``rank``, which holds it."""
    node = nodes.of(rank)
    return min((other for other in block.ranks if nodes.of(other) == node), default=nodes.bases[node])


def path_of(run_dir: str, rank: int) -> str:
    """The slot that names the mirrors of a rank."""
    return os.path.join(run_dir, f"mirror-{rank}")


def entries(run_dir: str, rank: int) -> dict[int, bytes]:
    """The mirrors of a rank that are whole, encoded, by step."""
    path = path_of(run_dir, rank)
    if not os.path.exists(path):
        return {}
    with Slot.open(path) as slot:
        content = slot.read()
    return dict(content.parts) if content is not None else {}


def newest(run_dir: str, rank: int) -> int:
    """The newest step of which a rank has a whole mirror; -1 if there is none."""
    return max(entries(run_dir, rank), default=-1)


def find(run_dir: str, rank: int, step: int) -> Entry:
    """The mirror of a step. StateMismatchError if there is none that is whole."""
    found = entries(run_dir, rank).get(step)
    if found is None:
        raise StateMismatchError(f"rank {rank} has no whole mirror of step {step}")
    return decode(found)


class Mirror:
    """This rank's mirrors: the two newest that are whole, in two buffers. Its methods belong to the main thread."""

    def __init__(self, run: Run, host: Session) -> None:
        self._run, self._host = run, host
        self._run_dir, self._rank, self._nodes = host.run_dir, host.rank, host.nodes
        every = self._every = host.channel.welcome.mirror_every
        self._pool = ThreadPoolExecutor(1, "checkpointless-mirror") if every else None
        self._copying: Future[None] | None = None
        self._slot: Slot | None = None
        self._whole: dict[int, bytes] = {}
        self._segments: dict[str, Segment] = {}

    def begin(self, private: PrivateState, last_value: bytes | None) -> None:
        """Start the mirror of the step that begins, if it is due and not there. Blocks for what forward may write."""
        step = private.step
        if self._pool is None or not is_due(step, self._every) or step in self._whole:
            return
        pieces = self._run.inventory.pieces()
        copies = {
            block: list(map(_still, held))
            for block, held in blocks(pieces).items()
            if lead(block, self._nodes, self._rank) == self._rank
        }
        content = pack(private)
        entry = Entry(
            step,
            [],
            self._run.shared(twins(pieces), last_value),
            self._run.known_bucket_orders(),
            content.blob,
            dict(content.parts),
            self._host.generation,
        )
        self._copying = self._pool.submit(self._copy, entry, copies)

    def wait(self) -> None:
        """Return when no copy is under way: before the first update, and before this rank is ready."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def continue_at(self, step: int) -> None:
        """In a replacement that goes on at this step: mirrors of later steps are of a run that was given up."""
        if self._pool is not None:
            self._whole = {at: data for at, data in entries(self._run_dir, self._rank).items() if at <= step}
            self._write()
            self._tell()

    def _tell(self) -> None:
        """The agent copies the newest mirror to another node, if there is one."""
        if len(self._nodes.bases) > 1:
            newest = decode(self._whole[max(self._whole)]) if self._whole else None
            told = Mirrored(newest.step, newest.begun) if newest is not None else Mirrored(-1, -1)
            self._host.channel.vote.send(told)

    def _copy(self, entry: Entry, copies: dict[Block, list[Piece]]) -> None:
        """On the thread of the pool."""
        try:
            self._keep(entry, copies)
        except OSError as error:
            self._pool = None
            logger.error(
                "[rank %d] mirrors end at step %d: %s. Enlarge the shared memory, or set mirror_every=0.",
                self._rank,
                entry.step,
                error,
            )

    def _keep(self, entry: Entry, copies: dict[Block, list[Piece]]) -> None:
        """The older of two mirrors is given up first."""
        while len(self._whole) > 1:
            del self._whole[min(self._whole)]
        self._write()
        watched = [
            tensor for held in copies.values() for piece in held for tensor in (piece.tensor, piece.outer)
        ]
        versions = list(map(_version, watched))
        used = {stripe.path for data in self._whole.values() for stripe in decode(data).stripes}
        for block, held in copies.items():
            whole = layout_of(held, [self._rank])
            segment = self._segment(block_name(block), whole.segment_bytes, used)
            entry.stripes.append(Stripe(block, str(segment.path), publish(held, whole, self._rank, segment)))
        if list(map(_version, watched)) != versions:
            logger.warning(
                "[rank %d] the mirror of step %d is torn, since a parameter was written before the optimizer's step",
                self._rank,
                entry.step,
            )
            return
        self._whole[entry.step] = encode(entry)
        self._write()
        self._tell()

    def _segment(self, block: str, nbytes: int, used: set[str]) -> Segment:
        """The one of two segments for this block that no whole mirror uses."""
        names = [f"mirror-{self._rank}-{buffer}-{block}" for buffer in "ab"]
        name = next(name for name in names if not any(path.endswith(f"/{name}") for path in used))
        held = self._segments.get(name)
        if held is None or held.nbytes != nbytes:
            held = self._segments[name] = Segment.share(Path(self._run_dir), name, nbytes, 0, nbytes)
        return held

    def _write(self) -> None:
        """Say which mirrors are whole, in one go."""
        if self._slot is None:
            path = path_of(self._run_dir, self._rank)
            self._slot = Slot.open(path) if os.path.exists(path) else Slot.create(path)
        self._slot.write(b"", self._whole)


def _still(piece: Piece) -> Piece:
    """The piece itself where nothing writes it before the first optimizer step, else a copy."""
    if piece.info.role in STILL:
        return piece
    made = make_tensor(piece.info, piece.tensor.device)
    carrier(made).copy_(carrier(piece.tensor))
    return Piece(piece.info, made, made)
