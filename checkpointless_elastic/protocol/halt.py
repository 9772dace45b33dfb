"""What the coordinator hears of a job that does not go on."""

from __future__ import annotations

from checkpointless_elastic.protocol.events import Late
from checkpointless_elastic.protocol.hangs import Where, culprits

__all__ = ["Halt"]


class Halt:
    """Gathers what agents say of their ranks, until all that count are there."""

    def __init__(self) -> None:
        self._moment = (-1, -1)
        self._wheres: dict[int, Where] = {}

    def heard(self, event: Late, expected: frozenset[int], running: bool) -> dict[int, tuple[str, float]]:
        """The ranks to blame, why, and for how many seconds they have been stuck; none while ranks are missing.

        ``expected``: those that count. ``running``: no recovery goes on.
        """
        moment = (event.generation, event.step)
        if moment != self._moment:
            self._moment, self._wheres = moment, {}
        self._wheres.update(event.ranks)
        if not expected <= self._wheres.keys():
            return {}
        wheres, self._wheres = {rank: self._wheres[rank] for rank in expected}, {}
        return {rank: (why, wheres[rank].seconds) for rank, why in culprits(wheres, running).items()}
