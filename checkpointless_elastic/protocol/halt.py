"""What the coordinator hears of a job that does not go on."""

from __future__ import annotations

from checkpointless_elastic.protocol.events import Late, Warn
from checkpointless_elastic.protocol.hangs import Activity, Where, culprits, parted

__all__ = ["Halt"]


VOTES_LIMIT_S = 60.0
"""How long all ranks may be ready without a commit: longer than the copies to guardians take that come before it."""


UNKNOWN = "none of them is known to be the cause"
AFTER = "After hang_timeout all workers are restarted."


class Halt:
    """Gathers what agents say of their ranks, until all that count are there.

    Attributes:
        votes_lost: as was heard last, all ranks have been ready for VOTES_LIMIT_S.
        stands: as was heard last, no rank has done anything for `hang_timeout`; not before the first call of all.
        cause: of that, as far as is known.
        told: what people should know after what was heard last.
    """

    def __init__(self) -> None:
        self.votes_lost = self.stands = False
        self.cause = UNKNOWN
        self.told: list[Warn] = []
        self._moment = (-1, -1)
        self._wheres: dict[int, Where] = {}

    def heard(self, event: Late, expected: frozenset[int], running: bool) -> dict[int, tuple[str, float]]:
        """The ranks to blame, why, and for how many seconds they have been stuck; none while ranks are missing.

        ``expected``: those that count. ``running``: no recovery goes on.
        """
        self.told, moment = [], (event.generation, event.step)
        if moment != self._moment:
            self._moment, self._wheres, self.cause = moment, {}, UNKNOWN
        self._wheres.update(event.ranks)
        if not expected or not expected <= self._wheres.keys():
            return {}
        wheres, self._wheres = {rank: self._wheres[rank] for rank in expected}, {}
        self.votes_lost = all(
            where.activity == Activity.GATE and where.seconds > VOTES_LIMIT_S for where in wheres.values()
        )
        late = any(where.late for where in wheres.values())
        self.stands = late and all(where.overlong for where in wheres.values())
        found = culprits(wheres, running)
        if running and not found:
            self._explain(parted(wheres))
        return {rank: (why, wheres[rank].seconds) for rank, why in found.items()}

    def _explain(self, cause: str) -> None:
        if cause and self.cause == UNKNOWN:
            self.cause = cause
            where = "generation {}, step {}".format(*self._moment)
            self.told.append(Warn(f"[{where}] The job does not go on: {cause}. {AFTER}"))
