"""The directory in virtual time: terms that are claimed once, beats, a verdict. Each call is atomic on arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointless_elastic.protocol.acts import Ask, Query
from simulator.clock import Clock

if TYPE_CHECKING:
    from simulator.agent import Agent
    from simulator.network import Network

__all__ = ["Directory"]

LIMIT_S = 1.0
"""A call that gets no answer fails after this long."""


class Directory:
    """Answers one agent's calls one after the other. ``side``: of the network, as for a host.

    Attributes:
        down: no call gets an answer; those under way may have been carried out all the same.
        owners: by term, who claimed it.
    """

    def __init__(self, clock: Clock, network: Network) -> None:
        self._clock, self._network = clock, network
        self.down = False
        self.side = 0
        self.term, self.address, self.verdict = 0, "", ""
        self.owners: dict[int, str] = {}
        self.claimed = 0.0  # when the newest term was
        self._counts: dict[int, int] = {}
        self._waiting: dict[Agent, list[Ask]] = {}

    def ask(self, agent: Agent, ask: Ask) -> None:
        """The answer follows, as a call of `agent.answered`."""
        queue = self._waiting.setdefault(agent, [])
        queue.append(ask)
        if len(queue) == 1:
            self._clock.after(self._network.delay(), self._arrives, agent, ask)

    def _arrives(self, agent: Agent, ask: Ask) -> None:
        if self._silent(agent):
            self._clock.after(LIMIT_S, self._replies, agent, ask, None)
        else:
            self._clock.after(self._network.delay(), self._replies, agent, ask, self._answer(agent, ask))

    def _silent(self, agent: Agent) -> bool:
        return self.down or agent.storeless or agent.side != self.side

    def _replies(self, agent: Agent, ask: Ask, answer: object) -> None:
        if answer is not None and self._silent(agent):
            self._clock.after(LIMIT_S, self._replies, agent, ask, None)
            return
        queue = self._waiting[agent]
        queue.pop(0)
        if queue:
            self._clock.after(self._network.delay(), self._arrives, agent, queue[0])
        agent.answered(ask, answer)

    def _answer(self, agent: Agent, ask: Ask) -> object:
        if ask.query is Query.NEWEST:
            return self.term, self.address, self.verdict
        if ask.query is Query.CLAIM:
            if self.term == ask.term - 1:
                self.term, self.address = ask.term, agent.address
                self.owners[ask.term], self.claimed = agent.name, self._clock.now
                agent.world.note(f"{agent.name} coordinates in term {ask.term}")
            return self.owners.get(ask.term) == agent.name and self.term == ask.term
        if ask.query is Query.LAST_BEAT:
            return self._counts.get(ask.term, -1)
        if ask.query is Query.END:
            self.verdict = self.verdict or ask.verdict
            return True
        if ask.term == self.term:
            self._counts[ask.term] = max(ask.count, self._counts.get(ask.term, -1))
        return ask.term == self.term
