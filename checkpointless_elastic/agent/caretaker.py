"""Lets workers start on this node only if it is fit for them; gives its seat up otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable

from checkpointless_elastic.agent.health import Health
from checkpointless_elastic.agent.membership import Membership
from checkpointless_elastic.agent.runtime import Workforce
from checkpointless_elastic.protocol.station import Station

__all__ = ["Caretaker"]

logger = logging.getLogger(__name__)


class Caretaker:
    """Base of `control.AgentControl`."""

    _health: Health
    _membership: Membership
    _workers: Workforce
    _station: Station | None

    def _if_fit(self, then: Callable[[], None]) -> None:
        """Do it if this node is found to be fit, now or in a while, and its seat is still the same."""
        station = self._station

        def found(reason: str) -> None:
            if self._station is not station or (station is not None and station.stopped):
                return
            if reason:
                self._unfit(reason)
            else:
                then()

        self._health.check(found)

    def stuck(self, rank: int, pid: int) -> None:
        """See ControlPlane."""
        if not self._workers.ended:
            self._unfit(f"the worker of rank {rank}, process {pid}, does not end after SIGKILL")

    def _unfit(self, reason: str) -> None:
        """This node leaves the job, which goes on if another one takes its seat."""
        logger.error("This node is not fit to run workers: %s. It leaves the job.", reason)
        if self._station is not None:
            self._station.stopped = True
        self._membership.leave(f"is not fit to run workers: {reason}")
        self._workers.withdraw(f"This node is not fit to run workers: {reason}.")
