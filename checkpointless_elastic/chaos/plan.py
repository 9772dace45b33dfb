"""Draws faults from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from checkpointless_elastic.chaos.strikes import KINDS

__all__ = ["Fault", "draw", "turns"]

USED = 0.95
"""Part of the job in which faults begin."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: its place, from 0.
        kind: a key of strikes.KINDS.
        target: the rank, or the agent's place (modulo their number), that it strikes.
        part: of the job, 0 to 1: it strikes when so much is done.
        late: of the time of a step, 0 to 1: and so much later, in a script that has steps.
    """

    number: int
    kind: str
    target: int
    part: float
    late: float


def draw(count: int, seed: int, kinds: Sequence[str], ranks: int, spares: int = 0) -> list[Fault]:
    """The faults of a job, each at a random moment in a stretch of its own; those that need a spare, as often as there
    is one. Some kind must need none."""
    source = random.Random(seed)
    kind_of = _affordable(turns(source, kinds), spares)
    return [
        Fault(
            number,
            next(kind_of),
            source.randrange(ranks),
            USED * (number + source.random()) / count,
            source.random(),
        )
        for number in range(count)
    ]


def _affordable(kinds: Iterator[str], spares: int) -> Iterator[str]:
    for kind in kinds:
        if not KINDS[kind].spare:
            yield kind
        elif spares:
            spares -= 1
            yield kind


def turns(source: random.Random, names: Sequence[str]) -> Iterator[str]:
    """All names in random order, again and again."""
    while True:
        yield from source.sample(list(names), len(names))
