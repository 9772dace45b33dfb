"""From where lost ranks get a block: the nearest live ranks, and the same answer on every rank that holds it."""

from __future__ import annotations

from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.worker.blocks import Block
from checkpointless_elastic.worker.mirror import lead
from checkpointless_elastic.worker.routes import MAX_SOURCES, by_members, routes

EVERYWHERE = Block((), "cpu")


def decided(world: int, *pending: int) -> Decision:
    sources = [rank for rank in range(world) if rank not in pending]
    return Decision(1, 5, sources, list(pending))


def test_the_node_of_a_rank_is_the_last_one_that_begins_at_or_below_it() -> None:
    nodes = Nodes((0, 2, 5))
    assert [nodes.of(rank) for rank in range(7)] == [0, 0, 1, 1, 1, 2, 2]


def test_on_one_node_all_live_holders_give_a_stripe() -> None:
    (route,) = routes(EVERYWHERE, decided(4, 1, 3), Nodes())
    assert (route.sources, route.readers, route.remote) == ((0, 2), (1, 3), False)


def test_live_ranks_of_the_own_node_come_before_all_others() -> None:
    near, far = routes(EVERYWHERE, decided(6, 1, 2, 3), Nodes((0, 2, 4)))
    assert (near.node, near.sources, near.readers, near.remote) == (0, (0,), (1,), False)
    assert (far.node, far.sources, far.readers, far.remote) == (1, (0, 4, 5), (2, 3), True)
    assert far.receiver == 2


def test_a_block_of_some_ranks_comes_from_those_and_not_at_all_where_none_lives() -> None:
    nodes = Nodes((0, 2, 4))
    (route,) = routes(Block((1, 3, 5), "cpu"), decided(6, 2, 3), nodes)
    assert (route.sources, route.readers) == ((1, 5), (3,))
    assert routes(Block((2, 3), "cpu"), decided(6, 2, 3), nodes) == []
    assert routes(Block((0, 1), "cpu"), decided(6, 2, 3), nodes) == []


def test_many_replicas_are_not_all_asked_and_two_lost_nodes_draw_on_different_ones() -> None:
    nodes = Nodes(tuple(range(0, 200, 2)))
    first, second = routes(EVERYWHERE, decided(200, 20, 120), nodes)
    assert not first.remote
    first, second = routes(EVERYWHERE, decided(200, 20, 21, 120, 121), nodes)
    assert len(first.sources) == len(second.sources) == MAX_SOURCES
    assert first.sources == tuple(range(22, 38, 2))
    assert not {*first.sources} & {*second.sources}


def test_every_member_finds_its_routes_in_the_same_order() -> None:
    nodes = Nodes((0, 2, 4))
    decision = decided(6, 2, 3, 4, 5)
    blocks = [EVERYWHERE, Block((0, 2, 4), "cpu"), Block((1, 3, 5), "cpu")]
    everything = [route for block in blocks for route in routes(block, decision, nodes)]
    orders = [list(by_members(everything, rank)) for rank in range(6)]
    whole = sorted({members for order in orders for members in order})
    assert len(whole) == 6
    for rank, order in enumerate(orders):
        assert order == [members for members in whole if rank in members]


def test_a_mirror_is_kept_on_each_node_that_holds_the_block() -> None:
    nodes = Nodes((0, 2, 4))
    assert [lead(EVERYWHERE, nodes, rank) for rank in range(6)] == [0, 0, 2, 2, 4, 4]
    assert [lead(Block((1, 2, 3), "cpu"), nodes, rank) for rank in (1, 2, 3)] == [1, 2, 2]
    assert [lead(Block((1, 3), "cpu"), Nodes(), rank) for rank in (1, 3)] == [1, 1]
