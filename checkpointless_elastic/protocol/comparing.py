"""What the coordinator does with what ranks say of their state, see `checks`: at a vote, and in a recovery."""

from __future__ import annotations

from abc import abstractmethod

from checkpointless_elastic.protocol.checks import judge, published, sentences
from checkpointless_elastic.protocol.events import Action, End, Warn
from checkpointless_elastic.protocol.messages import Stage
from checkpointless_elastic.protocol.resize import Resizing
from checkpointless_elastic.protocol.rungs import Choice, choose
from checkpointless_elastic.protocol.states import State

__all__ = ["Comparing"]


class Comparing(Resizing):
    """Part of `coordinator.Coordinator`."""

    @abstractmethod
    def _end(self, choice: Choice) -> list[Action]:
        """This run of the script is over."""

    @abstractmethod
    def _published(self) -> list[Action]:
        """All sources have published their state."""

    def _judge(self, said: dict[int, bytes]) -> list[Action]:
        """Ranks whose state is not that of their replicas are ended; the step must not be committed then.

        Where nobody knows which bytes are right, no loss is answered live any more. ``said``: see `checks.pack`.
        """
        if not any(said.values()):
            return []
        found = judge(said, self.step)
        self.holdings.distrust = self.holdings.distrust or found.unknown
        where = f"[generation {self.generation}, step {self.step}] Replicas differ"
        told: list[Action] = [Warn(f"{where}: {one}.") for one in sentences(found, self.protected)]
        if not found.wrong or not self.protected:
            return told
        self.ended |= found.wrong.keys()
        self._faults_since_commit += 1
        self._blame(found.wrong)
        self._fault = f"rank {min(found.wrong)} {found.wrong[min(found.wrong)]}"
        choice = choose(self._facts(found.wrong.keys()))
        if not choice.goes_on:
            return told + self._end(choice)
        return [*told, *(End(rank, cause) for rank, cause in found.wrong.items())]

    def _compared(self) -> list[Action]:
        """All sources have published: one whose state is not that of its replicas must not be one."""
        if self.state is not State.SETTLING or self.resizing:
            return self._published()
        told = self._judge(
            {rank: published(self._reports[Stage.PUBLISHED][rank]).said for rank in self.whole}
        )
        if self.ended or self.state is not State.SETTLING:
            return told
        if self.holdings.distrust:
            return told + self._end(choose(self._facts()))
        return told + self._published()
