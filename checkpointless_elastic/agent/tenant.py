"""How this agent comes to another seat than its present one, and how it gives its seat up."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from checkpointless_elastic.agent.caretaker import Caretaker
from checkpointless_elastic.protocol.between import RunAgain, Seated
from checkpointless_elastic.protocol.layout import ranks
from checkpointless_elastic.protocol.requests import Dismissed
from checkpointless_elastic.protocol.station import Station

if TYPE_CHECKING:
    from checkpointless_elastic.agent.links import Links
    from checkpointless_elastic.agent.wards import Wards
    from checkpointless_elastic.protocol.acts import Word

__all__ = ["Tenant"]

logger = logging.getLogger(__name__)


class Tenant(Caretaker):
    """Base of `control.AgentControl`."""

    _links: Links
    _wards: Wards | None
    _offered: Seated | None
    _running: bool
    _deferred: list[Word]
    _incarnations: dict[int, int]
    _tokens: dict[int, str]
    _pids: dict[int, int]
    _known_lost: set[tuple[int, int]]

    def _take_seat(self, seat: Seated) -> None:
        """Workers of another seat, if there were any, have ended or left the script."""
        raise NotImplementedError

    def _seated(self, seat: Seated) -> None:
        """The coordinator has given this agent a seat, perhaps instead of the one that it has."""
        if self._station is not None:
            self._station.stopped = True
            order = RunAgain(seat.generation, seat.restarts, seat.reason, seat.store, 3, seat.kept)
            self._move(order, seat)
        elif self._running:
            self._deferred.append(seat)
        else:
            self._take_seat(seat)

    def _run_again(self, station: Station, message: RunAgain) -> None:
        """All workers end or leave the script, then this agent takes its seat again."""
        station.obey(message)
        self._move(message, station.again(message))

    def _move(self, order: RunAgain, seat: Seated) -> None:
        self._membership.leave_seat(order.generation)
        self._offered, self._wards = None, None
        if self._running:
            self._deferred.append(seat)
            self._workers.restart_all(order)
        else:
            self._take_seat(seat)

    def _renumber(self, seat: Seated) -> None:
        """The ranks of this node may have other numbers in this seat: what is known of its workers goes along."""
        if self._station is None or self._station.seat.bases == seat.bases:
            return
        own = dict(zip(sorted(self._station.ranks), ranks(seat.seat, seat.bases, seat.world), strict=True))
        self._links.renumber(own)
        for known in (self._incarnations, self._tokens, self._pids):
            found = {own[rank]: value for rank, value in known.items() if rank in own}
            known.clear()
            known.update(found)  # type: ignore[arg-type]
        self._known_lost = {(own[rank], number) for rank, number in self._known_lost if rank in own}

    def give_way(self, reason: str) -> None:
        """See Office."""
        logger.error("This agent gives up its seat and ends its workers: %s.", reason)
        self._give_up_seat()

    def _give_up_seat(self) -> None:
        self._station, self._offered, self._wards = None, None, None
        self._deferred = []
        self._membership.leave_seat()
        if self._running:
            self._workers.give_up()

    def _dismissed(self, message: Dismissed) -> None:
        """The job goes on without this node: its workers end, then it leaves with exit code 0."""
        if not self._running:
            self._workers.succeed()
            return
        logger.warning("This node %s: its workers end, and it leaves the job.", message.cause)
        self._give_up_seat()
        self._deferred.append(message)
