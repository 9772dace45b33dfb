"""Which of the agents that come over to a new coordinator have their seats still."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from checkpointless_elastic.protocol.between import Standing
from checkpointless_elastic.protocol.events import Unfit

__all__ = ["is_later", "left_behind", "unfit"]


def is_later(one: Standing, other: Standing) -> bool:
    """Of two agents that claim one seat, the later one has it."""
    return (one.restarts, one.since) > (other.restarts, other.since)


def left_behind(standings: dict[int, Standing], ranks: Callable[[int], frozenset[int]]) -> list[int]:
    """Seats whose agents were cut off when these were given away: others have gone on without them.

    An agent cannot miss a generation in which the job ran, nor that its own ranks were lost.
    """
    newest = max((standing.restarts for standing in standings.values()), default=0)
    known = [standing for standing in standings.values() if standing.restarts == newest]
    ran = max((standing.ran for standing in known), default=0)
    lost: dict[int, set[int]] = {}
    for standing in known:
        lost.setdefault(standing.generation, set()).update(standing.lost)

    def was_lost(standing: Standing) -> bool:
        own = ranks(standing.seat) - set(standing.pending) - set(standing.gone)
        return any(own & gone for generation, gone in lost.items() if generation > standing.generation)

    return [standing.seat for standing in known if standing.generation < ran or was_lost(standing)]


def unfit(standings: Iterable[Standing]) -> Iterator[Unfit]:
    """What the last coordinator was told, and may not have acted on."""
    for standing in standings:
        for rank, reason in sorted(standing.unfit.items()):
            yield Unfit(rank, reason)
