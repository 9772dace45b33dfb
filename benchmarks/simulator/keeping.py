"""What an agent keeps beside its workers: state for a run by another number, and copies for the seat it guards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointless_elastic.protocol.between import Between
from checkpointless_elastic.protocol.station import Station
from simulator.oracle import Violation

if TYPE_CHECKING:
    from simulator.agent import Agent
    from simulator.worker import Worker
    from simulator.world import World

__all__ = ["Keeping"]


class Keeping:
    """Part of `agent.Agent`, which has the attributes' meaning."""

    world: World
    name: str
    alive: bool
    station: Station | None
    workers: dict[int, Worker]
    private: dict[int, tuple[int, int]]
    kept: dict[int, tuple[int, int]]
    left: dict[int, tuple[int, list[int]]]
    _guardian: str
    _copied_at: float

    def hear(self, do: object, *arguments: object) -> None:
        raise NotImplementedError

    def _report(self, message: Between | None) -> None:
        raise NotImplementedError

    def _start_all(self) -> None:
        raise NotImplementedError

    def leave_behind(self, rank: int, step: int, weights: list[int]) -> None:
        """A worker's state is kept for a run by another number of ranks."""
        assert self.station is not None
        self.left[rank - min(self.station.ranks)] = step, list(weights)

    def taken_up(self, rank: int, step: int) -> list[int]:
        """What the worker at the same place has left behind."""
        assert self.station is not None
        at = rank - min(self.station.ranks)
        if self.left.get(at, (-1,))[0] != step:
            raise Violation(f"rank {rank} of {self.name} is to take up step {step}, and there is {self.left}")
        return self.left[at][1]

    # ---- the guardian

    def _copy_all(self) -> None:
        for rank in list(self.private):
            self._copy(rank)

    def _copy(self, rank: int) -> None:
        if self._guardian and rank in self.private:
            self._copied_at = max(self._copied_at, self.world.clock.now + self.world.network.delay())
            self.world.clock.at(
                self._copied_at, self._copy_arrives, self._guardian, rank, self.private[rank], self.station
            )

    def _copy_arrives(self, address: str, rank: int, at: tuple[int, int], station: Station) -> None:
        if not self._guarded_by(address, station):
            return
        guardian = self.world.agents[address]
        if guardian.alive and self.world.network.reaches(self, guardian):
            self.world.copied(self, guardian)
            guardian.hear(guardian.keep, rank, at)
        elif self.alive and self.private.get(rank) == at:
            self.world.clock.after(self.world.rules.heartbeat, self._copy_arrives, address, rank, at, station)

    def _guarded_by(self, address: str, station: Station) -> bool:
        return self.alive and self.station is station and self._guardian == address

    def keep(self, rank: int, at: tuple[int, int]) -> None:
        """As a guardian: a ward's private state has come."""
        stale = self.station is not None and not self.station.keeps(rank, at[0])
        if stale or self.kept.get(rank, (-1, -1)) > at:
            return
        self.kept[rank] = at
        if self.station is not None:
            self._report(self.station.copied(rank, *at))

    def _fetch(self, station: Station) -> None:
        """Get the copies from the guardian, as soon as there is one that answers."""
        guardian = self.world.agents.get(self._guardian)
        reached = guardian is not None and guardian.alive and self.world.network.reaches(self, guardian)
        if guardian is None or not reached:
            self.world.clock.after(self.world.rules.heartbeat / 5, self.hear, self._fetch_again, station)
            return
        self.world.clock.after(self.world.network.delay(), guardian.hear, guardian.give, self, station)

    def _fetch_again(self, station: Station) -> None:
        if self.station is station and not self.workers:
            self._fetch(station)

    def give(self, ward: Agent, station: Station) -> None:
        """As a guardian: send what is kept."""
        kept = {rank: self.kept[rank] for rank in station.ranks if rank in self.kept}
        self.world.clock.after(self.world.network.delay(), ward.hear, ward.fetched, station, kept)

    def fetched(self, station: Station, kept: dict[int, tuple[int, int]]) -> None:
        """The guardian's copies."""
        if self.station is station and not self.workers:
            self.private.update(kept)
            self._start_all()
