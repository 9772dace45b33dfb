"""Who takes part, in which seat, and how agents are told: the part of `board` that knows the tree of many agents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from checkpointless_elastic.protocol import layout
from checkpointless_elastic.protocol.acts import Act, Perform, Tell
from checkpointless_elastic.protocol.between import (
    VERSION,
    Attach,
    Between,
    Done,
    Halt,
    Join,
    Order,
    Ordered,
    Reseated,
    Standing,
    Turned,
)
from checkpointless_elastic.protocol.coordinator import Coordinator
from checkpointless_elastic.protocol.events import Event, Reopened, Stop
from checkpointless_elastic.protocol.losses import WINDOW, Losses
from checkpointless_elastic.protocol.messages import Commit, Decision, Freeze, Hold, Rebuild, Resume
from checkpointless_elastic.protocol.overview import DRAINED, View, has_spare, obstacle, overview
from checkpointless_elastic.protocol.requests import (
    Declined,
    Dismissed,
    Drain,
    Drained,
    Inquiry,
    Overview,
    Place,
)
from checkpointless_elastic.protocol.rules import OnLoss, Rules
from checkpointless_elastic.protocol.tree import Tree

__all__ = ["Agent", "Roster", "short"]

_Told = TypeVar("_Told", bound=Ordered)


def short(message: _Told) -> _Told:
    """See Order."""
    return msgspec.structs.replace(message, sources=[]) if isinstance(message, Decision) else message


@dataclass
class Agent:
    """What the board knows of one: where it listens, how many workers it runs, and its seat (-1: none).

    ``takes``: the generation of the seat that it was given instead of another one, until it has `Took` it.
    ``warm``: see `requests.Warm`.
    """

    name: str
    address: str
    size: int
    seat: int = -1
    takes: int = -1
    warm: bool = False


class Roster(ABC):
    """Base of `board.Board`, which has the attributes' meaning."""

    def __init__(self, term: int, me: str, rules: Rules) -> None:
        self.acts: list[Act] = []
        self.bases: list[int] = []
        self.world = 0
        self.coordinator: Coordinator | None = None
        self._held_in = -1  # the generation of the newest Hold
        self._term, self._me, self._rules = term, me, rules
        self._agents: dict[str, Agent] = {}
        self._seats: list[str] = []  # the agent in each, '' when it is vacant
        self._tree = Tree(0, rules.fan_out)
        self._numbered = 0  # orders that went down the tree
        self._taken: list[bool] = []  # the next agent in this seat continues what the last one did
        self._restarts = self._resizes = 0  # runs of the script after the first one; those of another world
        self._over = False
        self._drained: dict[
            int, tuple[str, str, bool]
        ] = {}  # by seat: who had it, why it is given up, and whether it stays as a spare
        self._losses = Losses(rules.node_faults)
        self._excluded: set[str] = set()  # agents that get no seat any more
        self._causes: dict[int, str] = {}  # why the last coordinator's seat is vacant, if it said so
        self._dropped: list[str] = []  # agents that lost their seats since the job last ran

    def _know(self, bases: list[int], world: int) -> None:
        self.bases, self.world = bases, world
        self._tree = Tree(len(bases), self._rules.fan_out)
        self._seats, self._taken = [""] * len(bases), [False] * len(bases)

    def _new_coordinator(self, generation: int, began: int = 0) -> Coordinator:
        rules = self._rules
        ranks = frozenset(range(self.world))
        return Coordinator(ranks, rules.max_faults_per_step, generation, rules.mirror_every, began)

    @abstractmethod
    def left(self, name: str, why: str) -> None:
        """An agent has lost its seat, or is gone."""

    @abstractmethod
    def _decide(self, event: Event) -> None:
        """Tell the coordinator, and do what it wants."""

    # ---- the tree

    def is_attached(self, name: str) -> bool:
        """Does this agent hang on another one?"""
        agent = self._agents.get(name)
        return agent is not None and agent.seat in self._tree.parents

    def hangs_on(self, name: str, parent: str) -> bool:
        """Does this agent hang on that one?"""
        agent, other = self._agents.get(name), self._agents.get(parent)
        return agent is not None and other is not None and self._tree.parents.get(agent.seat) == other.seat

    def _attach(self) -> None:
        """The job runs: make the tree whole. A broken tree costs a generation, which an unprotected job has not."""
        assert self.coordinator is not None
        if not self.coordinator.protected:
            return
        for seat, parent in self._tree.missing():
            name, other = self._seats[seat], self._seats[parent]
            if name and other and self._me not in (name, other):
                self._tell(name, Attach(self._agents[other].address))

    def _attached(self, agent: Agent, address: str) -> None:
        parent = next((a.seat for a in self._agents.values() if a.address == address and a.seat >= 0), -1)
        if parent < 0 or not self._tree.attached(agent.seat, parent):
            self._tell(agent.name, Attach(""))

    def _detached(self, agent: Agent, address: str) -> None:
        parent = self._tree.parents.get(agent.seat, -1)
        if parent >= 0 and self._agents[self._seats[parent]].address == address:
            self._dissolve(parent)
            self._decide(Reopened("a connection between agents has ended"))

    def _dissolve(self, seat: int) -> None:
        for child in self._tree.dissolve(seat):
            if self._seats[child]:
                self._tell(self._seats[child], Attach(""))

    # ---- telling

    def _order(self, message: Ordered, only: set[int] | None = None) -> None:
        """To all agents with a seat; only to those with one of these ranks."""
        if isinstance(message, (Commit, Freeze, Decision, Rebuild, Resume)):
            self._numbered += 1
            self._losses.commits += isinstance(message, Commit)
            dropped = [name for name in self._dropped if name not in self._seats]
            order = Order(self._term, short(message), self._numbered, dropped)
            for seat, name in enumerate(self._seats):
                if name and seat not in self._tree.parents:
                    self._tell(name, order)
            return
        order = Order(self._term, message)
        if isinstance(message, Done):
            for name in self._agents:
                self._tell(name, order)
            return
        for seat, name in enumerate(self._seats):
            wanted = only is None or not only.isdisjoint(self._ranks(seat))
            if name and wanted:
                self._tell(name, order)

    def hold(self, name: str) -> None:
        """An agent is gone, which is acted on when it is certain that this one coordinates."""
        if name in self._agents and self._agents[name].seat >= 0:
            self._hold()

    def _hold(self) -> None:
        if self.coordinator is not None and self._held_in != self.coordinator.generation:
            self._held_in = self.coordinator.generation
            self._order(Hold(self._held_in))

    def _tell_rank(self, rank: int, message: Between) -> None:
        seat = next(seat for seat in reversed(range(len(self.bases))) if self.bases[seat] <= rank)
        if self._seats[seat]:
            self._tell(self._seats[seat], message)

    def _tell(self, name: str, message: Between) -> None:
        self.acts.append(Tell(name, message))

    def _ranks(self, seat: int) -> frozenset[int]:
        return frozenset(layout.ranks(seat, self.bases, self.world))

    def _tell_guardians(self, standings: list[Standing]) -> None:
        """The last coordinator may not have told all who has the seat after theirs."""
        for standing in standings:
            seat = (standing.seat + 1) % len(self._seats)
            name = self._seats[seat]
            if name and self._seats[standing.seat] and self._agents[name].address != standing.guardian:
                reseated = Order(self._term, Reseated({seat: self._agents[name].address}))
                self._tell(self._seats[standing.seat], reseated)

    def _halt(self, reason: str, ranks: list[int]) -> None:
        if self._over:
            return
        self._over = True
        self.acts.append(Perform(Stop(reason, tuple(ranks))))
        for name in self._agents:
            self._tell(name, Order(self._term, Halt(reason, ranks)))

    # ---- clients ask, agents leave

    def consult(self, question: Inquiry | Drain) -> Overview | Drained | Declined:
        """The answer to a client, who is no agent."""
        view = self._view()
        if isinstance(question, Inquiry):
            return overview(view)
        declined = obstacle(view, question)
        if declined is None:
            if question.keep and not has_spare(view, self._agents[question.agent].size):
                self._excluded.add(question.agent)  # else the job would grow by it again
            self._drain(question, DRAINED)
        return declined or Drained()

    def _view(self) -> View:
        places = [
            Place(it.seat, it.name, it.address, it.size, self._tree.parents.get(it.seat, -1))
            for it in self._agents.values()
        ]
        vacant = [seat for seat, name in enumerate(self._seats) if not name]
        return View(
            self._term,
            self._me,
            places,
            self.bases,
            self.world,
            vacant,
            self._restarts,
            self.coordinator,
            self._over,
            frozenset(self._excluded),
            self._rules.active_nodes,
            self._resizes,
            self._may_shrink(1),
        )

    def _may_shrink(self, fewer: int = 0) -> bool:
        """May the job go on with the nodes it has, or so many fewer, as far as their number counts?"""
        here = sum(map(bool, self._seats)) - fewer
        return self._rules.on_loss is OnLoss.SHRINK and here >= max(1, self._rules.min_nodes)

    def _drain(self, drain: Drain, cause: str) -> None:
        """Its seat is given up as that of a lost agent; it is told when that is confirmed."""
        if drain.seat < 0 or (drain.agent == self._me and not drain.keep):
            if drain.agent != self._me:  # else the next coordinator gives its seat away
                del self._agents[drain.agent]
            self._tell(drain.agent, Dismissed(cause))
        else:
            self._drained[drain.seat] = drain.agent, cause, drain.keep
            self.left(drain.agent, cause)

    def _dismiss(self, seat: int) -> None:
        name, cause, stays = self._drained.pop(seat, ("", "", False))
        if name:
            self._tell(name, Turned(f"its seat {seat} {cause}", True) if stays else Dismissed(cause))

    # ---- agents that lose their workers again and again

    def _note_loss(self, agent: Agent, rank: int) -> None:
        """Those that go back to their mirrors with all are not to blame."""
        it = self.coordinator
        if it is not None and (rank not in it.ended or rank in it.blamed):
            self._losses.note(agent.name)

    def _exclude_worst(self) -> None:
        """A recovery has ended: the node that is worse than all others loses its seat, if a spare can take it."""
        name, count = self._losses.worst()
        agent = self._agents.get(name)
        if agent is None:
            return
        drain = Drain(agent.seat, name, True)  # it stays: the rendezvous store may live there
        if obstacle(replace(self._view(), shrinks=False), drain) is None:
            self._losses.forget(name)
            self._excluded.add(name)
            self._drain(drain, f"was excluded, since {count} of its workers were lost within {WINDOW} steps")

    def _spare(self, size: int) -> Agent | None:
        """One that may take a seat with so many ranks."""
        waiting = (agent for name, agent in self._agents.items() if name not in self._excluded)
        return next((agent for agent in waiting if agent.seat < 0 and agent.size == size), None)

    def _refusal(self, join: Join) -> str:
        """Why this agent may not take part; empty: it may."""
        if join.version != VERSION:
            return f"it speaks version {join.version}, the coordinator {VERSION}"
        return "the job has ended" if self._over else ""

    def explain(self, seat: int, cause: str) -> None:
        """The last coordinator has said why its seat will be vacant. Before `take_over`."""
        self._causes[seat] = cause

    @property
    def agents(self) -> list[str]:
        """Names of all that take part."""
        return list(self._agents)
