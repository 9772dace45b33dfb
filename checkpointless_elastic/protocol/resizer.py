"""The board's part in running the script again: when the number of ranks changes, and who gets which seat then.

With ``on_loss=shrink`` the job shrinks at once when a node is lost and no spare can take its seat, and grows back, up
to ``active_nodes``, when an agent waits as a warm spare. It does neither where no whole replicas of the state would be
left (`resize.obstacle`), and it does not shrink below ``min_nodes``: then it waits, as with ``on_loss=wait``.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable

from checkpointless_elastic.protocol.acts import Perform, Restarting
from checkpointless_elastic.protocol.between import Attach, RunAgain, Spare
from checkpointless_elastic.protocol.coordinator import Coordinator
from checkpointless_elastic.protocol.events import Action, Kept, Resize, Resized, Restart, Warn
from checkpointless_elastic.protocol.resize import obstacle
from checkpointless_elastic.protocol.roster import Agent, Roster
from checkpointless_elastic.protocol.rules import OnLoss
from checkpointless_elastic.protocol.rungs import Rung
from checkpointless_elastic.protocol.states import State

__all__ = ["Resizer"]


class Resizer(Roster):
    """Part of `board.Board`."""

    _open_store: Callable[[], str]
    _store: str
    _suspects: list[tuple[int, str]]
    _ended: dict[int, dict[int, int]]
    _waits_since: int = -1  # the generation for which it was said why the job does not shrink

    @abstractmethod
    def _perform(self, action: Action) -> None:
        """Do what the coordinator wants."""

    @abstractmethod
    def _vacant(self) -> list[int]:
        """Seats without an agent, whose loss is confirmed."""

    @abstractmethod
    def _seat(self, seat: int, taken: bool, reason: str = "") -> None:
        """Tell an agent of its seat."""

    def _consider(self) -> None:
        """Shrink, or grow, if that is due."""
        it = self.coordinator
        if self._rules.on_loss is not OnLoss.SHRINK or it is None or self._over or it.released:
            return
        if it.state is State.ENDED or it.resizing or self._suspects:
            return
        vacant = self._vacant()
        if vacant and self._may_shrink():
            self._shrink(it, vacant)
        elif not vacant and it.state is State.RUNNING and not it.resumed and it.protected:
            self._grow(it)

    def _shrink(self, it: Coordinator, vacant: list[int]) -> None:
        if not it.protected and it.step == it.first:
            return  # it is run again from its top anyway, with all nodes
        stay = it.ranks - {rank for seat in vacant for rank in self._ranks(seat)}
        why = obstacle(it, stay)
        if why and it.whole <= it.holdings.held.keys():
            self._say_that_it_waits(it, vacant, why)
        if not why:
            here, all_of_them = len(self._seats) - len(vacant), len(self._seats)
            goes_on = f"the job goes on with {here} of {all_of_them} nodes"
            self._decide(Resize(f"no spare takes the place of node {vacant[0]}, and {goes_on}"))

    def _say_that_it_waits(self, it: Coordinator, vacant: list[int], why: str) -> None:
        if self._waits_since != it.generation:
            self._waits_since = it.generation
            waits = f"The job waits for a node in place of node {vacant[0]}, and does not go on without it"
            self.acts.append(Perform(Warn(f"[generation {it.generation}, step {it.step}] {waits}: {why}.")))

    def _grow(self, it: Coordinator) -> None:
        more = self._newcomers(len(self._seats))
        if more and not obstacle(it, it.ranks, sum(agent.size for agent in more)):
            after = len(self._seats) + len(more)
            self._decide(
                Resize(f"a node has come, and the job goes on with {after} instead of {len(self._seats)}")
            )

    def _newcomers(self, seats: int) -> list[Agent]:
        """Spares that get seats beside so many others."""
        free = (agent for name, agent in self._agents.items() if name not in self._excluded)
        waiting = [agent for agent in free if agent.seat < 0 and agent.warm]  # all would wait for a cold one
        return waiting[: max(0, self._rules.active_nodes - seats)]

    # ---- a new layout

    def _kept(self, action: Kept) -> None:
        """State was left behind by these ranks. While a seat is in doubt its loss, which follows, begins this anew."""
        if action.keepers and not self._suspects and self.coordinator is not None:
            self._resize(action.step, action.keepers, self.coordinator.resizing)

    def _resize(self, step: int, keepers: frozenset[int], reason: str) -> None:
        """Number seats and ranks anew, and have the script run again with the state of this step."""
        old, before = self.coordinator, self.world
        assert old is not None
        old.state = State.ENDED
        moves = [
            (self._agents[name], sorted(self._ranks(seat))) for seat, name in enumerate(self._seats) if name
        ]
        moves += [(agent, []) for agent in self._newcomers(len(moves))]
        for seat in {seat for seat, _ in self._suspects} | self._drained.keys():
            self._dismiss(seat)
        self._suspects.clear()
        for child in self._tree.parents:
            self._tell(self._seats[child], Attach(""))
        firsts = [0, *itertools.accumulate(agent.size for agent, _ in moves)]
        self._know(firsts[:-1], firsts[-1])
        self._ended = {}
        self._restarts, self._resizes = self._restarts + 1, self._resizes + 1
        self._store = self._open_store()
        self.coordinator = new = self._new_coordinator(old.generation + 1, Rung.RERUN)
        resized = Resized(new.generation, step, reason, before, self.world)
        self.acts.append(Perform(resized))
        kept = self._give_seats(moves, keepers)
        _, *acts = new.begin_at(step, kept)  # each agent is told of the decision with its seat
        for seat in range(len(moves)):
            self._seat(seat, False, f"{reason} ({before} ranks before, {self.world} from step {step} on)")
        for agent in self._agents.values():
            if agent.seat < 0:
                self._tell(agent.name, Spare(self._term, self.bases, self.world))
        for action in acts:
            self._perform(action)

    def _give_seats(self, moves: list[tuple[Agent, list[int]]], keepers: frozenset[int]) -> frozenset[int]:
        """Seats by the order of the agents, with the ranks that each had; the new numbers of the keepers."""
        assert self.coordinator is not None
        found: set[int] = set()
        for seat, (agent, had) in enumerate(moves):
            agent.takes = self.coordinator.generation if had else -1
            agent.seat, self._seats[seat] = seat, agent.name
            found |= {self.bases[seat] + at for at, rank in enumerate(had) if rank in keepers}
        return frozenset(found)

    # ---- the same layout

    def _run_again(self, restart: Restart) -> None:
        """By rung 3 or 4; with kept state, if there is any, and then without vacant seats, if it may shrink."""
        old = self.coordinator
        assert old is not None
        old.state = State.ENDED
        kept, vacant = old.kept if old.fresh and old.keepers else -1, self._vacant()
        if kept >= 0 and vacant and self._may_shrink():
            self._resize(kept, old.keepers, restart.reason)
            return
        reason = f"rung {restart.rung}: {restart.reason}"
        self.acts.append(Perform(Restarting(restart.rung, restart.reason, old.generation + 1, old.step)))
        if self._restarts - self._resizes >= self._rules.max_restarts:
            self._halt(
                f"no restart is left (--max-restarts is {self._rules.max_restarts}) and one is needed: {reason}",
                list(old.blamed),
            )
            return
        self._restarts += 1
        self._store = self._open_store()
        self.coordinator = new = self._new_coordinator(old.generation + 1, restart.rung)
        self._ended = {}
        self._taken = [False] * len(self._seats)
        self._order(RunAgain(new.generation, self._restarts, reason, self._store, restart.rung, kept))
        for action in new.begin_at(kept, old.keepers) if kept >= 0 else []:
            self._perform(action)
        if vacant and self._rules.on_loss is OnLoss.SHRINK and kept < 0:
            self._say_that_it_waits(
                new, vacant, "its script is run again from its top, which all nodes begin together"
            )
