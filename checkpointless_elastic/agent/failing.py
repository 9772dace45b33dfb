"""How the job's failure becomes this node's: whose exit code torchrun's summary names."""

from __future__ import annotations

import logging

from checkpointless_elastic.agent.runtime import EventLoop, Workforce
from checkpointless_elastic.protocol.between import Halt
from checkpointless_elastic.protocol.station import Station

__all__ = ["Failing"]

logger = logging.getLogger(__name__)

EXIT_LIMIT_S = 10.0
"""How long the end of a job waits for the exit of the worker that is to blame."""


class Failing:
    """One per agent."""

    def __init__(self, loop: EventLoop, workers: Workforce) -> None:
        self._loop, self._workers = loop, workers
        self._culprits: list[int] = []

    def begin(self) -> None:
        """The workers of a seat are about to start."""
        self._culprits = []

    def halt(self, message: Halt, station: Station | None) -> None:
        """The job has failed. The exit code of a worker that is to blame is named in the summary."""
        if message.reason:
            logger.error("The job stops: %s.", message.reason.rstrip("."))
        own = sorted(station.ranks) if station is not None else []
        bad = [rank for rank, status in station.gone.items() if status] if station is not None else []
        self._culprits = [rank for rank in message.ranks if rank in own] or bad
        if station is not None:
            station.stopped = True
        self._workers.because(message.reason)
        if all(self._workers.has_ended(rank) for rank in self._culprits):
            self._workers.fail(self._culprits)
        else:
            self._loop.call_later(EXIT_LIMIT_S, lambda: self._workers.fail(self._culprits))

    def exited(self, rank: int) -> None:
        """A worker's exit code is known."""
        if rank in self._culprits:
            self._workers.fail(self._culprits)

    def cannot_go_on(self, reason: str) -> None:
        """This agent cannot take part any more, whatever the others do."""
        logger.error("%s", reason)
        self._workers.because(reason)
        self._workers.fail([])
