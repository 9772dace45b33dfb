"""What the coordinator does about replicas that differ: the part of `coordinator` that knows the rules of `checks`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from checkpointless_elastic.protocol.checks import judge
from checkpointless_elastic.protocol.events import Action, Deadline, Differ, End
from checkpointless_elastic.protocol.holdings import Holdings
from checkpointless_elastic.protocol.states import State

__all__ = ["Judging"]


class Judging(ABC):
    """Base of `coordinator.Coordinator`, which has the attributes' meaning."""

    step: int
    generation: int
    holdings: Holdings
    _ended: set[int]

    @property
    @abstractmethod
    def protected(self) -> bool:
        """Can a loss be answered by rung 1?"""

    @abstractmethod
    def _too_many(self, ranks: tuple[int, ...]) -> Action | None:
        """Count a fault; the end of the job, if there were too many."""

    @abstractmethod
    def _end(self, action: Action) -> list[Action]:
        """The last decision."""

    def _judge(self, said: dict[int, bytes]) -> list[Action]:
        """Ranks whose state is not that of their replicas are ended; the step must not be committed then.

        Where nobody knows which bytes are right, no loss is answered live any more.
        """
        if not any(said.values()):
            return []
        found = judge(said, self.step)
        self.holdings.distrust = self.holdings.distrust or found.unknown
        then = (
            "is replaced" if self.protected else "is left as it is, since no lost rank can be recovered live"
        )
        sentences = [f"rank {rank} {cause}, and {then}" for rank, cause in found.wrong.items()]
        if found.unknown:
            sentences.append(f"{found.unknown}: no lost rank can be recovered live any more")
        told: list[Action] = [Differ(self.generation, self.step, sentence) for sentence in sentences]
        if not found.wrong or not self.protected:
            return told
        if stop := self._too_many(tuple(found.wrong)):
            return told + self._end(stop)
        self._ended = set(found.wrong)
        ends = [End(rank, cause) for rank, cause in found.wrong.items()]
        return [*told, *ends, Deadline(self.generation, State.RUNNING.value, "settle_timeout")]
