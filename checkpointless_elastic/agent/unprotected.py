"""The control plane of a job that nobody protects: what torchrun does, without waiting to find out."""

from __future__ import annotations

from checkpointless_elastic.agent.runtime import EventLoop, Workforce

__all__ = ["UnprotectedControl"]


class UnprotectedControl:
    """Any failure restarts all workers while restarts are left, then fails the job."""

    serves_workers = False
    generation = 0

    def __init__(self) -> None:
        self._workers: Workforce | None = None
        self._running: set[int] = set()

    def attach(self, loop: EventLoop, workers: Workforce) -> None:
        """Remember whom to command."""
        self._workers = workers

    def started(self, rank: int, incarnation: int, pid: int, token: str) -> None:
        """One more to wait for."""
        self._running.add(rank)

    def lost(self, rank: int, incarnation: int) -> None:
        """Nothing yet: the status decides."""

    def exited(self, rank: int, incarnation: int, status: int) -> None:
        """All ended well: done. One did not: all again, or the end."""
        assert self._workers is not None, "attach() comes first"
        self._running.discard(rank)
        if status and not self._workers.restart_all(f"rank {rank} ended with status {status}"):
            self._workers.fail([rank])
        elif not status and not self._running:
            self._workers.succeed()

    def stopped(self) -> None:
        """Nothing is open."""
