"""The job goes on with another number of ranks: the coordinator's part.

Ranks, their number and what follows from both stand in too many places of a script that runs. So the script is run
again from its top, as by rung 3, but its state is kept:

1. A generation is opened. Survivors come to one step, as always, and the Decision says ``resizes``: they leave the
   state of that step behind, in memory of their node, and report Stage.PUBLISHED.
2. `Kept`: the board numbers seats and ranks anew and has the script run again. A new coordinator begins (`begin_at`).
3. All ranks run the script up to its first loop or replayable call, and really meet there. It is the end of a recovery,
   with a Decision of its own: *keepers*, ranks whose state is on their node, take it from there and publish; others get
   it from them. Then all resume at the step that was void.

Until a step is committed the state that was left behind stays, and a fault leads back to 2: another rerun, with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Set

from checkpointless_elastic.protocol.events import (
    Action,
    Broadcast,
    Deadline,
    Kept,
    Reopened,
    Resize,
    Restart,
)
from checkpointless_elastic.protocol.messages import Decision
from checkpointless_elastic.protocol.ranks import Ranks
from checkpointless_elastic.protocol.rungs import Rung
from checkpointless_elastic.protocol.states import State

__all__ = ["NOT_OWN", "Resizing", "obstacle"]

NOT_OWN = b"not own"
"""What a rank says with PUBLISHED if it left behind only what all ranks hold."""


class Resizing(Ranks):
    """Part of `coordinator.Coordinator`.

    Attributes:
        resizing: why the recovery that goes on ends with another number of ranks; empty: it does not.
        first: the step at which this run of the script began.
        kept: the same, if that was with the state of the last run; -1: it was not, or that state is of no use.
        keepers: ranks whose kept state is on their node.
    """

    decision: Decision | None

    @abstractmethod
    def _reopened(self, event: Reopened) -> list[Action]:
        """Open a generation."""

    @abstractmethod
    def _deadline(self) -> Deadline:
        """For the present state."""

    @property
    def fresh(self) -> bool:
        """Nothing was committed since this run began with kept state, which is still there."""
        return self.kept >= 0 and self.step == self.first

    def begin_at(self, step: int, keepers: frozenset[int]) -> list[Action]:
        """A new run of the script takes up the state of this step."""
        self.step = self.first = self.kept = step
        self.keepers = keepers
        self.whole, self.pending = set(keepers), set(self.ranks - keepers)
        self.state = State.SETTLING
        self.decision = Decision(self.generation, step, sorted(self.whole), sorted(self.pending))
        return [Broadcast(self.decision), self._deadline()]

    def _left_behind(self, published: dict[int, bytes]) -> list[Action]:
        """What sources have said when they had left their state behind."""
        if not self.whole <= published.keys():
            return []
        keepers = frozenset(rank for rank in self.whole if published[rank] != NOT_OWN)
        if keepers:
            return [Kept(self.step, keepers)]
        self.state = State.ENDED
        return [Restart(Rung.RERUN, f"{self.resizing}, and no rank has done a step since it was replaced")]

    def _resize(self, event: Resize) -> list[Action]:
        self.resizing = event.cause
        return [] if self.state is State.FREEZING else self._reopened(Reopened(event.cause))


def obstacle(it: Resizing, stay: Set[int], more: int = 0) -> str:
    """Why these ranks and so many new ones cannot be the job, as part of a sentence; empty: they can.

    Each piece of state must be with every rank, or with every k-th one, as on a mesh whose first dimension is
    replicated: then whole replicas are left when these are numbered anew.
    """
    if not it.whole:
        return "no rank lives that has its state"
    if it.holdings.distrust:
        return it.holdings.distrust
    missing = it.whole - it.holdings.held.keys()
    if missing:
        return f"rank {min(missing)} has not said yet what state it holds"
    numbers = {rank: number for number, rank in enumerate(sorted(stay))}
    for rank in sorted(it.whole & stay):
        for claim in it.holdings.held[rank].claims:
            if claim and not _is_whole(claim, rank, it.ranks, numbers, more):
                return f"rank {rank} holds a part of the state, and no whole replicas of it would be left"
    return ""


def _is_whole(claim: list[int], rank: int, ranks: Set[int], numbers: dict[int, int], more: int) -> bool:
    """Is a piece that these ranks share with every k-th rank, and will it be?"""
    every = len(ranks) // len(claim)
    before = {other for other in ranks if other % every == rank % every}
    after = {number for number in numbers.values() if number % every == numbers[rank] % every}
    left = {numbers[other] for other in claim if other in numbers}
    return set(claim) == before and left == after and (len(numbers) + more) % every == 0
