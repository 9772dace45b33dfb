"""An agent's part: gathers what its own workers report into one message to the coordinator per stage."""

from __future__ import annotations

from checkpointless_elastic.protocol.events import AllFrozen, Tally
from checkpointless_elastic.protocol.messages import Decision, Frozen, Report, Stage
from checkpointless_elastic.protocol.states import State

_LAST = {
    State.SETTLING: (Stage.PUBLISHED, Stage.ARRIVED),
    State.RESTORING: (Stage.RESTORED,),
    State.REBUILDING: (Stage.REBUILT,),
}
"""What a rank reports when it comes out of a state."""


class Node:
    """Gathers for the ranks of one node. Reports of an older generation are dropped.

    ``wards``: ranks of another node. A step is ready here only when what they had when they were ready for it was
    copied to this node: once it is committed, their replacements need it.
    """

    def __init__(self, ranks: frozenset[int], generation: int, wards: frozenset[int] = frozenset()) -> None:
        self.ranks = ranks
        self.generation = generation
        self._wards = wards
        self._copied: dict[int, tuple[int, int]] = {}
        self._pending: frozenset[int] = frozenset()
        self._exited: set[int] = set()
        self._reports: dict[Stage, dict[int, bytes]] = {}
        self._heard: dict[Stage, set[int]] = {}  # who has reported, in this generation
        self._step = 0
        self._frozen: dict[int, Frozen] = {}

    def opened(self, generation: int, lost: frozenset[int]) -> None:
        """A generation was opened: whatever was gathered is void."""
        self.generation = generation
        self._pending = lost & self.ranks
        self._exited = set()
        self._reports, self._heard = {}, {}
        self._frozen = {}

    def decided(self, decision: Decision) -> None:
        """The coordinator has named who holds the state and who needs it."""
        self._pending = frozenset(decision.pending) & self.ranks

    def exited(self, rank: int) -> Tally | None:
        """A worker ended well without waiting: nothing more is expected of it. The tally of those that have finished,
        when it was the last one that was missing.
        """
        self._exited.add(rank)
        return self._tally(Stage.FINISHED) if Stage.FINISHED in self._reports else None

    def report(self, rank: int, report: Report) -> Tally | None:
        """A worker has reached a stage. The tally, when it was the last one expected of this node."""
        if report.generation != self.generation:
            return None
        self._reports.setdefault(report.stage, {})[rank] = report.payload
        self._heard.setdefault(report.stage, set()).add(rank)
        self._step = report.step
        return self._tally(report.stage)

    def copied(self, rank: int, generation: int, step: int) -> Tally | None:
        """A ward's state was copied. The tally of the step, when this was the last that was missing."""
        if rank not in self._wards:
            return None
        if (generation, step) < self._copied.get(rank, (generation, step)):  # of an agent that lost that seat
            return None
        self._copied[rank] = (generation, step)
        return self._tally(Stage.READY) if Stage.READY in self._reports else None

    def frozen(self, rank: int, answer: Frozen) -> AllFrozen | None:
        """A worker has answered Freeze. All answers, when it was the last one expected of this node."""
        if answer.generation != self.generation:
            return None
        self._frozen[rank] = answer
        if not self.ranks - self._pending <= self._frozen.keys():
            return None
        return AllFrozen(self.generation, dict(self._frozen))

    def present(self, state: State) -> set[int]:
        """Ranks that have come out of this state of the coordinator, in this generation."""
        if state is State.FREEZING:
            return set(self._frozen)
        return set().union(*(self._heard.get(stage, ()) for stage in _LAST[state]))

    def _tally(self, stage: Stage) -> Tally | None:
        if not self._expected(stage) <= self._reports[stage].keys():
            return None
        if stage is Stage.READY and not self._kept():
            return None
        return Tally(stage, self.generation, self._step, self._reports.pop(stage))

    def _kept(self) -> bool:
        now = (self.generation, self._step)
        return all(self._copied.get(rank) == now for rank in self._wards)

    def _expected(self, stage: Stage) -> frozenset[int]:
        if stage is Stage.PUBLISHED:
            return self.ranks - self._pending
        if stage in (Stage.ARRIVED, Stage.RESTORED):
            return self._pending
        return self.ranks - self._exited if stage is Stage.FINISHED else self.ranks
