"""A block of many chunks comes over the network to two ranks of another node."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.state.pieces import PARAMETER, Piece, PieceInfo
from checkpointless_elastic.state.plan import Chunk
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.transfer import publish, restore
from checkpointless_elastic.worker.blocks import Block, layout_of
from checkpointless_elastic.worker.network import WINDOW, Network, receive, send
from checkpointless_elastic.worker.routes import routes
from tests.groups.processes import Job, Worker

BLOCK = Block((), "cpu")
SIZES = (30_000_003, 5, 12_000_000, 70_001)


def state(seed: int) -> list[Piece]:
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for number, size in enumerate(SIZES):
        tensor = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        info = PieceInfo(f"piece {number}", PARAMETER, "uint8", "cpu", (size,), (1,), size)
        pieces.append(Piece(info, tensor, tensor))
    return pieces


def take_part(folder: str, worker: Worker) -> Any:
    """Ranks 0 and 1 are live, 2 and 3 were lost, on the other node."""
    decision, nodes = Decision(1, 5, [0, 1], [2, 3]), Nodes((0, 2))
    network = Network(worker.registry, lambda: worker.store, 1, worker.rank)
    found = routes(BLOCK, decision, nodes)
    if worker.rank < 2:
        send(network, found, {BLOCK: state(1)})
        return True
    pieces = state(2)
    nbytes = layout_of(pieces, found[0].sources).segment_bytes
    rooms = (
        {BLOCK: Segment.share(Path(folder), "received", nbytes, 0, nbytes)}
        if worker.rank == found[0].receiver
        else {}
    )
    taken: list[Chunk] = []
    segment = receive(
        network, found, {BLOCK: pieces}, rooms, lambda block, source, chunk: taken.append(chunk)
    )[BLOCK]
    layout, expected = layout_of(pieces, found[0].sources), state(1)
    with Segment.create(Path(folder), f"own-{worker.rank}", layout.segment_bytes) as own:
        digests = [one for source in (0, 1) for one in publish(expected, layout, source, own)]
    restore(pieces, layout, segment, digests)
    worker.store.set(f"read/{worker.rank}", "")
    worker.store.wait(["read/2", "read/3"])
    assert (len(taken) > 2 * WINDOW) == (worker.rank == 2)
    return all(torch.equal(mine.tensor, theirs.tensor) for mine, theirs in zip(pieces, expected, strict=True))


def test_many_chunks_arrive_on_both_ranks_bit_by_bit(tmp_path: Path) -> None:
    with Job(functools.partial(take_part, str(tmp_path)), 4) as job:
        assert job.results() == [True] * 4


def leave_at_once(worker: Worker) -> Any:
    """Many times, since what is tested is who is faster."""
    for generation in range(1, 51):
        worker.registry.supersede(generation)
        with Network(worker.registry, lambda: worker.store, generation, worker.rank).peers((0, 1, 2, 3, 4)):
            pass
    return True


def test_a_member_that_leaves_at_once_does_not_disturb_others_as_they_connect() -> None:
    with Job(leave_at_once, 5) as job:
        assert job.results() == [True] * 5
