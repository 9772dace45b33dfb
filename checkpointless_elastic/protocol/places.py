"""Which ranks are on which node: the same rule on the coordinator, the agents and the workers."""

from __future__ import annotations

from bisect import bisect_right

import msgspec

__all__ = ["Nodes"]


class Nodes(msgspec.Struct, frozen=True):
    """The nodes of one run of the script, by number.

    Attributes:
        bases: the lowest rank of each node, ascending from 0; a node's ranks follow each other.
    """

    bases: tuple[int, ...] = (0,)

    def of(self, rank: int) -> int:
        """The node of a rank."""
        return bisect_right(self.bases, rank) - 1
