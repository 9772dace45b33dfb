"""What the coordinator knows of the job's ranks: who lives, who holds what, what they have said, their faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from checkpointless_elastic.protocol.between import Standing
from checkpointless_elastic.protocol.events import Lost
from checkpointless_elastic.protocol.holdings import Holdings
from checkpointless_elastic.protocol.messages import Frozen, Stage
from checkpointless_elastic.protocol.rungs import Facts
from checkpointless_elastic.protocol.states import State

__all__ = ["Ranks"]


class Ranks:
    """Base of `coordinator.Coordinator`, which has the attributes' meaning."""

    def __init__(
        self, ranks: frozenset[int], max_faults_per_step: int, generation: int, mirror_every: int, began: int
    ) -> None:
        self.ranks = ranks
        self.generation = self._ran_in = generation  # now, and when the job last ran
        self.state = State.RUNNING
        self.released = False
        self.step = self.first = 0
        self.kept = -1
        self.keepers: frozenset[int] = frozenset()
        self.resizing = ""
        self.store = ""
        self._store_lost = False  # since the job last ran
        self.whole = set(ranks)
        self.pending: set[int] = set()
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self.exited: set[int] = set()
        self.holdings = Holdings(ranks)
        self._unprotected: set[int] = set(ranks)
        self._frozen: dict[int, Frozen] = {}  # answers to Freeze
        self._reports: dict[Stage, dict[int, bytes]] = {}
        self._mirror_every = mirror_every
        self._mirrored: dict[int, int] = {}  # of lost ranks, the step of their newest mirror
        self.ended: set[int] = set()
        self._fault = ""  # the newest one, as a sentence
        self._max_faults = max_faults_per_step
        self._faults_since_commit = 0
        self._endings = 0  # how often survivors were ended since then
        self.blamed: dict[int, None] = {}
        self._began = began
        self._errors: dict[int, tuple[int, str]] = {}

    def take_over(self, standings: Iterable[Standing], store: str) -> None:
        """Know what the last coordinator knew, as far as agents can tell. NodeLost or Reopened comes next.

        ``store``: where workers meet from now on, since the last one was lost with the last coordinator.
        """
        self.store, self._store_lost = store, True
        for standing in standings:
            self.step = max(self.step, standing.step)
            self.pending |= set(standing.pending)
            self.lost |= set(standing.lost) | set(standing.pending)
            self.left |= set(standing.left)
            self.exited |= set(standing.gone)
            self._unprotected -= set(standing.protected)
            self.holdings.held |= standing.held
            self.released |= standing.released
            self.kept = max(self.kept, standing.kept)
            self.keepers |= set(standing.keepers)
        self.first = max(0, self.kept)
        self.whole -= self.pending
        self._ran_in = self.generation - 1 if self.lost else self.generation
        if self.step > self.first and self.holdings.held:
            # those that said nothing had made a Run too, or this step was not reached
            self._unprotected &= self.holdings.held.keys()
            self.holdings.find_twins()

    def protect(self, rank: int) -> None:
        """This rank's script has made a Run."""
        self._unprotected.discard(rank)

    @property
    def protected(self) -> bool:
        """Can a loss be answered by rung 1, as far as is known now?"""
        return self.step > self.first and not self._unprotected and not self.holdings.distrust

    def _expected(self, stage: Stage) -> Set[int]:
        if stage is Stage.PRESENT:
            return self._missing()
        if stage is Stage.PUBLISHED:
            return self.whole
        if stage in (Stage.ARRIVED, Stage.RESTORED):
            return self.pending
        return self.ranks - self.exited if stage is Stage.FINISHED else self.ranks

    def _missing(self) -> set[int]:
        if self.state is State.FREEZING:
            return self.whole - (self._frozen.keys() - self.ended)
        if self.state is State.SETTLING:
            here = self._reports.get(Stage.PUBLISHED, {}).keys() | self._reports.get(Stage.ARRIVED, {}).keys()
            return (self.whole if self.resizing else set(self.ranks)) - here
        stage = Stage.RESTORED if self.state is State.RESTORING else Stage.REBUILT
        return set(self._expected(stage)) - self._reports.get(stage, {}).keys()

    def _remove(self, ranks: Set[int], fault: str) -> set[int]:
        """These ranks are lost, and with them those that had ended well: all of them are returned."""
        newly = {*ranks, *self.exited}
        self._fault = fault
        self.exited = set()
        self.ended -= newly
        self.lost |= newly
        self.whole -= newly
        self.pending |= newly
        return newly

    def _blame(self, ranks: Iterable[int]) -> None:
        self.blamed |= dict.fromkeys(rank for rank in ranks if rank not in self.blamed)

    def _repeated(self, event: Lost) -> str:
        """The exception of this rank, if it had the same one at this step before; '' otherwise."""
        failure = (self.step, event.error)
        if event.error and self._errors.get(event.rank) == failure:
            return event.error
        if event.error:
            self._errors[event.rank] = failure
        return ""

    def _keeps(self, mirrored: Mapping[int, int]) -> None:
        """Guardians have said of which steps they keep mirrors: what a lost rank left on its own node may be older."""
        for rank in mirrored.keys() & self.lost:
            self._mirrored[rank] = max(self._mirrored.get(rank, -1), mirrored[rank])

    def _stranded(self) -> tuple[int, ...]:
        """Ranks that are lost, or soon will be, of which no other rank holds all that they held."""
        gone, stay = self.pending | self.ended, self.whole - self.ended
        return tuple(rank for rank in sorted(gone) if not self.holdings.twins(rank) & stay)

    def _facts(self, ranks: Set[int] = frozenset()) -> Facts:
        """Of the newest fault, which has struck these ranks."""
        return Facts(
            self._fault,
            tuple(sorted(ranks)),
            step=self.step,
            first=self.first,
            whole=self.whole,
            stranded=self._stranded(),
            unprotected=self._unprotected,
            distrust=self.holdings.distrust,
            faults=self._faults_since_commit,
            most=self._max_faults,
            began=self._began,
            endings=self._endings,
            mirror_every=self._mirror_every,
            mirrored=self._mirrored,
        )
