"""State goes through shared memory between real processes, and damage on the way is found."""

from __future__ import annotations

import functools
import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn, optim

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.pieces import Manifest, Piece
from checkpointless_elastic.state.plan import PieceSize, Plan, chunks, plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver, in_segment, publish, restore
from tests.state.worlds import World, batches, bits, build

_ADAMW = functools.partial(optim.AdamW, lr=0.01)


def _layout(pieces: list[Piece], sources: list[int]) -> Plan:
    return plan([PieceSize(piece.info.nbytes) for piece in pieces], sources)


def _trained() -> World:
    torch.set_num_threads(1)  # a sum over threads has other bits
    world = build(0, _ADAMW)
    for batch in batches(3):
        world.step(batch)
    return world


def _survivor(rank: int, sources: list[int], directory: str, pipe: Connection) -> None:
    """A process that trained alike and publishes its stripe of the parent's segment."""
    inventory = _trained().inventory()
    pieces = inventory.pieces()
    layout = _layout(pieces, sources)
    segment = Segment.open(Path(directory) / "state", layout.segment_bytes)
    digests = publish(pieces, layout, rank, segment)
    pipe.send_bytes(msgspec.msgpack.encode((inventory.manifest(), digests)))


def test_three_survivors_in_processes_of_their_own_fill_a_replacement_bit_by_bit(tmp_path: Path) -> None:
    sources = [0, 2, 3]
    expected = _trained().inventory()
    layout = _layout(expected.pieces(), sources)
    context = multiprocessing.get_context("fork")
    workers, said = [], []
    with Segment.create(tmp_path, "state", layout.segment_bytes) as segment:
        for rank in sources:
            mine, theirs = context.Pipe()
            workers.append(context.Process(target=_survivor, args=(rank, sources, str(tmp_path), theirs)))
            workers[-1].start()
            said.append(mine)
        answers = [
            msgspec.msgpack.decode(pipe.recv_bytes(), type=tuple[Manifest, list[ChunkDigest]])
            for pipe in said
        ]
        for worker in workers:
            worker.join()
        target = build(1, _ADAMW).inventory()
        target.adopt(answers[0][0])
        report = restore(
            target.pieces(), layout, segment, [item for _, digests in answers for item in digests]
        )
        target.load_meta(answers[0][0])
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert bits(target) == bits(expected)
    assert report.nbytes == layout.nbytes == sum(piece.info.nbytes for piece in expected.pieces())
    assert report.seconds > 0


def _large() -> list[Piece]:
    model = nn.Module()
    model.register_buffer("first", torch.arange(3_000_000, dtype=torch.float32))
    model.register_buffer("small", torch.arange(100, dtype=torch.float32))
    model.register_buffer("odd", torch.arange(9, dtype=torch.uint8)[1:8])
    return Inventory({"model": model}).pieces()


def _published(tmp_path: Path, sources: list[int]) -> tuple[Plan, Segment, list[ChunkDigest]]:
    pieces = _large()
    layout = _layout(pieces, sources)
    segment = Segment.create(tmp_path, "state", layout.segment_bytes)
    return layout, segment, [item for rank in sources for item in publish(pieces, layout, rank, segment)]


@pytest.mark.parametrize(
    ("offset", "names", "source"),
    [(100, "model.first", 1), (11_999_999, "model.first", 4), (12_000_100, "pieces up to model.odd", 4)],
)
def test_one_damaged_byte_is_found_and_piece_and_source_are_named(
    tmp_path: Path, offset: int, names: str, source: int
) -> None:
    layout, segment, digests = _published(tmp_path, [1, 4])
    segment.bytes[offset] ^= 16
    with segment, pytest.raises(StateMismatchError, match=rf"from rank {source} was damaged.*{names}"):
        restore(_large(), layout, segment, digests)


def test_a_stripe_that_was_not_published_is_named(tmp_path: Path) -> None:
    layout, segment, digests = _published(tmp_path, [1, 4])
    with segment, pytest.raises(StateMismatchError, match="Rank 4 did not publish"):
        restore(_large(), layout, segment, [item for item in digests if item.source == 1])


def test_a_transfer_is_not_finished_before_all_sources_are_received(tmp_path: Path) -> None:
    layout, segment, digests = _published(tmp_path, [1, 4])
    with segment:
        receiver = Receiver(_large(), layout, in_segment(segment))
        for source, missing in ((4, [1, 4]), (1, [1])):
            with pytest.raises(StateMismatchError, match=re.escape(f"ranks {missing} never arrived")):
                receiver.finish()
            with receiver.taking(digests) as take:
                for chunk in chunks(layout.stripes[source]):
                    take(source, chunk)
        assert receiver.finish().nbytes == 12_000_407


def test_parameters_that_require_gradients_are_filled_without_a_trace_in_autograd(tmp_path: Path) -> None:
    source, target = nn.Linear(300, 300), nn.Linear(300, 300)
    theirs, mine = Inventory({"m": source}).pieces(), Inventory({"m": target}).pieces()
    layout = _layout(theirs, [0])
    with Segment.create(tmp_path, "state", layout.segment_bytes) as segment:
        restore(mine, layout, segment, publish(theirs, layout, 0, segment))
    assert target.weight.is_leaf
    assert target.weight.requires_grad
    assert torch.equal(target.weight, source.weight)
    target(torch.ones(1, 300)).sum().backward()
    assert target.weight.grad is not None
