"""The plan covers every byte of every piece once, in nearly equal stripes."""

from __future__ import annotations

import random

import pytest

from checkpointless_elastic.state.plan import ALIGNMENT, PieceSize, Plan, chunks, plan


def _assert_covered_once(pieces: list[PieceSize], result: Plan) -> None:
    parts = [part for stripe in result.stripes.values() for part in stripe]
    for number, piece in enumerate(pieces):
        mine = sorted((part for part in parts if part.piece == number), key=lambda part: part.offset)
        expected = 0 if number in result.unsourced else piece.nbytes
        assert sum(part.length for part in mine) == expected
        end = 0
        for part in mine:
            assert part.offset == end
            assert part.length > 0
            end += part.length
    spans = sorted((part.segment_offset, part.length) for part in parts)
    for (start, length), (following, _) in zip(spans, spans[1:], strict=False):
        assert start + length <= following
    assert not spans or spans[-1][0] + spans[-1][1] <= result.segment_bytes


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_sent_once_by_a_rank_that_has_it(seed: int) -> None:
    draw = random.Random(seed)
    ranks = range(draw.randint(1, 6))
    pieces = []
    for _ in range(draw.randint(0, 60)):
        holders = frozenset(rank for rank in ranks if draw.random() < 0.5) if draw.random() < 0.3 else None
        pieces.append(PieceSize(draw.choice([0, 1, 4, 63, 64, 65, 1000, 70_000, 9_000_000]), holders))
    sources = [rank for rank in ranks if draw.random() < 0.8]
    result = plan(pieces, sources)
    _assert_covered_once(pieces, result)
    assert set(result.stripes) == set(sources)
    for rank, stripe in result.stripes.items():
        for part in stripe:
            holders = pieces[part.piece].replicas
            assert holders is None or rank in holders
    for number, piece in enumerate(pieces):
        holders = frozenset(sources) if piece.replicas is None else piece.replicas & frozenset(sources)
        assert (number in result.unsourced) == (piece.nbytes > 0 and not holders)


def test_stripes_of_replicated_state_differ_by_64_bytes_at_most() -> None:
    result = plan([PieceSize(10_000_000), PieceSize(4), PieceSize(333_333)], [1, 2, 5])
    sizes = [sum(part.length for part in stripe) for stripe in result.stripes.values()]
    assert max(sizes) - min(sizes) <= 2 * ALIGNMENT


def test_whole_pieces_start_at_multiples_of_64() -> None:
    result = plan([PieceSize(5)] * 10, [0])
    assert [part.segment_offset for part in result.stripes[0]] == [64 * number for number in range(10)]


def test_the_plan_does_not_depend_on_the_order_of_the_sources() -> None:
    pieces = [PieceSize(1000), PieceSize(3000, frozenset({1, 2}))]
    assert plan(pieces, [2, 0, 1]) == plan(pieces, [0, 1, 2])


def test_pieces_without_a_live_replica_are_listed() -> None:
    result = plan([PieceSize(8, frozenset({3})), PieceSize(8), PieceSize(0, frozenset({3}))], [0, 1])
    assert result.unsourced == (0,)


def test_no_source_at_all_leaves_everything_unsourced() -> None:
    assert plan([PieceSize(8)], []).unsourced == (0,)


def test_chunks_are_no_larger_than_asked_and_cover_the_stripe() -> None:
    pieces = [PieceSize(size) for size in (5, 100, 10_000, 64, 3, 250)]
    stripe = plan(pieces, [0]).stripes[0]
    result = chunks(stripe, 256)
    assert all(chunk.length <= 256 for chunk in result)
    assert sum(part.length for chunk in result for part in chunk.ranges) == sum(
        part.length for part in stripe
    )
    for chunk in result:
        for part in chunk.ranges:
            assert chunk.offset <= part.segment_offset
            assert part.segment_offset + part.length <= chunk.offset + chunk.length


def test_small_pieces_share_a_chunk() -> None:
    assert len(chunks(plan([PieceSize(4)] * 500, [0]).stripes[0])) == 1
