"""How many workers each seat has, in few bytes: most jobs have the same number on every node."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["bases", "ranks", "runs"]


def ranks(seat: int, bases: Sequence[int], world: int) -> range:
    """Of one seat."""
    return range(bases[seat], bases[seat + 1] if seat + 1 < len(bases) else world)


def runs(bases: list[int], world: int) -> list[tuple[int, int]]:
    """(how many seats, workers of each) for the first rank of each seat and the number of ranks; empty for none."""
    sizes = [after - first for first, after in itertools.pairwise([*bases, world])]
    return [(len(list(seats)), size) for size, seats in itertools.groupby(sizes)]


def bases(nodes: list[tuple[int, int]]) -> tuple[list[int], int]:
    """The first rank of each seat, and the number of ranks."""
    sizes = [size for seats, size in nodes for _ in range(seats)]
    firsts = [0, *itertools.accumulate(sizes)]
    return firsts[:-1], firsts[-1]
