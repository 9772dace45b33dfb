"""State goes from two processes to a third one over the network, and what has arrived is verified meanwhile."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.pieces import PARAMETER, Piece, piece_of
from checkpointless_elastic.state.plan import CHUNK_BYTES, Chunk
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import EVERYBODY
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver, in_segment, vouch
from checkpointless_elastic.worker.blocks import Block, layout_of
from checkpointless_elastic.worker.network import WINDOW, Network, receive, send
from checkpointless_elastic.worker.routes import Route
from tests.groups.processes import Job, Worker

BLOCK = Block(EVERYBODY, "cpu")
SOURCES, READER = (0, 1), 2
ROUTE = Route(BLOCK, 1, SOURCES, (READER,), True)
CHUNKS = WINDOW + 2  # of each source


def pieces_of(seed: int) -> list[Piece]:
    """One piece of many chunks, and some that share one, among them one with holes."""
    numbers = torch.arange(seed, seed + len(SOURCES) * CHUNKS * CHUNK_BYTES // 4, dtype=torch.int32)
    small = numbers[:400].view(100, 4) * 7
    return [piece_of("large", PARAMETER, numbers), *_small(small)]


def _small(table: torch.Tensor) -> list[Piece]:
    return [piece_of("holes", PARAMETER, table[:, :3]), piece_of("last", PARAMETER, table[:, 3].clone())]


def network_of(worker: Worker) -> Network:
    return Network(worker.registry, lambda: worker.store, 1, worker.rank)


def source(worker: Worker, damaged: bool) -> list[bool]:
    """Says its digests, then sends; with a bit that flips in between."""
    pieces = pieces_of(0)
    worker.store.set(
        f"digests-{worker.rank}", msgspec.json.encode(vouch(pieces, layout(pieces), worker.rank))
    )
    if damaged and worker.rank == 1:
        pieces[0].tensor[-1] ^= 1
    send(network_of(worker), [ROUTE], {BLOCK: pieces})
    return []


def layout(pieces: list[Piece]) -> Any:
    return layout_of(pieces, SOURCES)


def reader(worker: Worker) -> list[bool]:
    """Whether the last chunk of all was still to come when each chunk was taken; then, whether each piece is equal."""
    pieces, still_to_come = pieces_of(1), []
    said = [
        msgspec.json.decode(worker.store.get(f"digests-{rank}"), type=list[ChunkDigest]) for rank in SOURCES
    ]
    with TemporaryDirectory() as folder:
        segment = Segment.create(Path(folder), "room", layout(pieces).segment_bytes)
        receiver = Receiver(pieces, layout(pieces), in_segment(segment))
        end = pieces[0].info.nbytes
        with segment, receiver.taking([item for digests in said for item in digests]) as take:

            def took(block: Block, source: int, chunk: Chunk) -> None:
                still_to_come.append(not segment.bytes[end - 8 : end].any())
                take(source, chunk)

            receive(network_of(worker), [ROUTE], {BLOCK: pieces}, {BLOCK: segment}, took)
        receiver.finish()
    assert len(still_to_come) == len(said[0]) + len(said[1])
    equal = [torch.equal(mine.tensor, sent.tensor) for mine, sent in zip(pieces, pieces_of(0), strict=True)]
    return [still_to_come[0], *equal]


def transfer(worker: Worker, damaged: bool) -> list[bool]:
    if worker.rank != READER:
        return source(worker, damaged)
    if not damaged:
        return reader(worker)
    with pytest.raises(StateMismatchError, match="from rank 1 was damaged on its way: large"):
        reader(worker)
    return []


def test_chunks_are_verified_while_others_are_on_their_way() -> None:
    with Job(functools.partial(transfer, damaged=False)) as job:
        assert job.results() == [[], [], [True, True, True, True]]


@pytest.mark.slow
def test_a_bit_that_flips_on_the_way_is_found_and_the_senders_are_not_held_up() -> None:
    with Job(functools.partial(transfer, damaged=True)) as job:
        assert job.results() == [[], [], []]
