"""From where each lost rank gets a block: from live ranks of its own node if there are any, else over the network.

Pure: every rank that holds a block finds the same routes from the decision and the places of ranks, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.worker.blocks import Block, holds

__all__ = ["MAX_SOURCES", "Route", "by_members", "routes"]

MAX_SOURCES = 8
"""Ranks that send one block to one node: more fill no network card, and every two members of a route are connected."""


class Route(NamedTuple):
    """How a block comes to one node.

    Attributes:
        block: what travels.
        node: where to.
        sources: live ranks that give a stripe each.
        readers: lost ranks of the node that hold the block, ascending. Over the network the first receives for all.
        remote: over the network.
    """

    block: Block
    node: int
    sources: tuple[int, ...]
    readers: tuple[int, ...]
    remote: bool

    @property
    def receiver(self) -> int:
        """The rank that receives for its node."""
        return self.readers[0]

    @property
    def members(self) -> tuple[int, ...]:
        """All ranks that take part, ascending."""
        return tuple(sorted((*self.sources, *self.readers)))


def routes(block: Block, decision: Decision, nodes: Nodes) -> list[Route]:
    """One for each node that needs the block, in the order of nodes; none if no rank that holds it lives."""
    live = [rank for rank in decision.sources if holds(block.ranks, rank)]
    readers: dict[int, list[int]] = {}
    for rank in sorted(decision.pending):
        if holds(block.ranks, rank):
            readers.setdefault(nodes.of(rank), []).append(rank)
    return [_route(block, node, live, waiting, nodes) for node, waiting in sorted(readers.items()) if live]


def _route(block: Block, node: int, live: list[int], readers: list[int], nodes: Nodes) -> Route:
    near = tuple(rank for rank in live if nodes.of(rank) == node)
    return Route(block, node, near or _far(node, live, nodes), tuple(readers), not near)


def _far(node: int, live: list[int], nodes: Nodes) -> tuple[int, ...]:
    """Sources for another node: spread over the nodes behind it, so that several lost nodes draw on different ones."""
    turn: dict[int, int] = {}
    keys = {}
    for rank in sorted(live):
        home = nodes.of(rank)
        turn[home] = turn.get(home, -1) + 1
        keys[rank] = (turn[home], (home - node) % len(nodes.bases))
    return tuple(sorted(sorted(live, key=lambda rank: keys[rank])[:MAX_SOURCES]))


def by_members(found: Iterable[Route], rank: int) -> dict[tuple[int, ...], list[Route]]:
    """Routes over the network that this rank is part of, by who takes part; in an order that is the same on all."""
    groups: dict[tuple[int, ...], list[Route]] = {}
    for route in sorted(route for route in found if route.remote and rank in route.members):
        groups.setdefault(route.members, []).append(route)
    return dict(sorted(groups.items()))
