"""The coordinator's side of agents: who has which seat, who waits as a spare, and what they are told.

A *seat* is a place in the job with fixed ranks. The agent in it may change: a lost agent's seat goes to a spare, or to
an agent that comes later. `Coordinator` decides about steps and ranks; the board turns what agents say into its events,
and its actions into messages. Like it, the board does no input or output and reads no clock.

That an agent is gone is acted on only after the directory has confirmed that this term is the newest (`Guard`): a
coordinator that was cut off or paused must not give away seats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol import layout
from checkpointless_elastic.protocol.acts import Guard, Heard, Perform
from checkpointless_elastic.protocol.between import (
    AnswerBundle,
    Attached,
    Between,
    Bundle,
    Detached,
    Done,
    EndRank,
    Gathered,
    Join,
    NodeEnded,
    Order,
    Pace,
    RankExited,
    RankExplained,
    RankGone,
    RankSays,
    RankStarted,
    ReplaceRank,
    Reseated,
    Seated,
    Spare,
    Standing,
    Turned,
)
from checkpointless_elastic.protocol.branch import unbundled
from checkpointless_elastic.protocol.coordinator import State
from checkpointless_elastic.protocol.events import (
    Action,
    Broadcast,
    Deadline,
    End,
    Event,
    Kept,
    NodeLost,
    Overdue,
    Reached,
    Reopened,
    Replace,
    Restart,
    Stop,
    Succeed,
    Warn,
)
from checkpointless_elastic.protocol.hearing import event_of
from checkpointless_elastic.protocol.messages import (
    Commit,
    Protected,
    Release,
    Replicas,
    Restore,
    Resume,
)
from checkpointless_elastic.protocol.requests import Took, Warm
from checkpointless_elastic.protocol.resizer import Resizer
from checkpointless_elastic.protocol.roster import Agent, short
from checkpointless_elastic.protocol.rules import OnLoss, Rules
from checkpointless_elastic.protocol.takeover import is_later, left_behind, unfit

__all__ = ["Board"]


class Board(Resizer):
    """See the module. ``open_store()``: makes a new store for workers and gives its address.

    Attributes:
        acts: what is to be done, taken away by whoever calls.
        bases, world: see Seated; empty before the job begins.
    """

    def __init__(self, term: int, me: str, rules: Rules, open_store: Callable[[], str]) -> None:
        super().__init__(term, me, rules)
        self._open_store = open_store
        self._store = ""
        self._suspects: list[
            tuple[int, str]
        ] = []  # seats whose agent is gone, and why, until that is confirmed
        self._early: list[tuple[str, Between]] = []  # said while agents come over from the last coordinator
        self._ended: dict[int, dict[int, int]] = {}
        self._standings: dict[int, Standing] = {}
        self._awaited: set[int] = set()  # seats whose agents may still come over from the last coordinator
        self._since: dict[str, float] = {}  # when what has a limit began

    # ---- agents come

    def take_over(self, bases: list[int], world: int, old_seat: int, now: float) -> None:
        """The job goes on under a new coordinator: wait for the agents with seats, but for that of the old one."""
        self._know(bases, world)
        self._awaited = set(range(len(bases))) - {old_seat}
        self._since["taking over"] = now
        if not self._awaited:
            self._go_on()

    def join(self, join: Join, now: float) -> None:
        """An agent has connected."""
        refusal = self._refusal(join)
        if refusal:
            self._tell(join.agent, Turned(refusal, False))
        elif join.nodes and not self.bases:
            self.take_over(*layout.bases(join.nodes), -1, now)
            self.join(join, now)
        elif join.standing is not None and layout.bases(join.nodes) != (self.bases, self.world):
            self._tell(join.agent, Turned("its seat is one of another number of ranks", True))
        elif join.standing is not None:
            self._rejoin(join, join.standing)
        elif len(self._agents.keys() - self._excluded) >= self._rules.max_nodes:
            self._tell(join.agent, Turned(f"the job has its {self._rules.max_nodes} nodes", False))
        else:
            self._agents[join.agent] = Agent(join.agent, join.address, join.size)
            self._since.setdefault("gathering", now)
            self._welcome(join.agent)

    def _welcome(self, name: str) -> None:
        self._tell(name, Spare(self._term, self.bases, self.world))
        if not self.bases:
            if len(self._agents) >= self._rules.active_nodes:
                self._begin()
        elif self.coordinator is not None:
            self._fill()

    def _rejoin(self, join: Join, standing: Standing) -> None:
        """An agent that has a seat comes over, or back."""
        rival = self._standings.get(standing.seat)
        if self.coordinator is None and rival is not None and is_later(standing, rival):
            self._evict(standing.seat)
        elif standing.seat not in self._awaited:
            self._tell(join.agent, Turned(f"its seat {standing.seat} was given up", True))
            return
        self._awaited.discard(standing.seat)
        self._agents[join.agent] = Agent(join.agent, join.address, join.size, standing.seat)
        self._seats[standing.seat] = join.agent
        self._standings[standing.seat] = standing
        if not self._awaited:
            self._go_on()

    def _evict(self, seat: int) -> None:
        """The agent that came over for this seat has lost it since."""
        del self._standings[seat]
        name, self._seats[seat] = self._seats[seat], ""
        del self._agents[name]
        self._tell(name, Turned(f"its seat {seat} was given up", True))

    def _begin(self) -> None:
        """Enough agents are there: the first ones get seats, the coordinator's own the first."""
        names = sorted(self._agents, key=lambda name: name != self._me)[: self._rules.active_nodes]
        sizes = [self._agents[name].size for name in names]
        self._know([0, *itertools.accumulate(sizes)][:-1], sum(sizes))
        for name in self._agents:
            if name not in names:
                self._tell(name, Spare(self._term, self.bases, self.world))
        self._store = self._open_store()
        self.coordinator = self._new_coordinator(0)
        for seat, name in enumerate(names):
            self._seats[seat], self._agents[name].seat = name, seat
        for seat in range(len(names)):
            self._seat(seat, taken=False)

    def _go_on(self) -> None:
        """All that will come over from the last coordinator have: open a generation with what is lost."""
        for seat in left_behind(self._standings, self._ranks):
            self._evict(seat)
        standings = list(self._standings.values())
        missing = [seat for seat, name in enumerate(self._seats) if not name]
        self._awaited.clear()
        self._store = self._open_store()
        self._restarts = max((standing.restarts for standing in standings), default=0)
        self._resizes = max((standing.resizes for standing in standings), default=0)
        self.coordinator = self._new_coordinator(max((s.generation for s in standings), default=0))
        successor = self.coordinator
        successor.take_over(standings, self._store)
        if any(standing.released for standing in standings):
            self._release(standings, missing)
        elif len({standing.restarts for standing in standings}) > 1:
            self._run_again(Restart(4, "the coordinator was lost while the script was being started again"))
        else:
            lost, resizes = "was lost with the coordinator", self._resizes
            self._lose([(seat, self._causes.get(seat, lost)) for seat in missing])
            if not missing:
                self._decide(Reopened("the coordinator is another one"))
            for event in unfit(standings):
                if self.coordinator is successor:  # else the script is run again already
                    self._decide(event)
            if self._resizes != resizes:
                standings = []  # of seats with other numbers
        self._tell_guardians(standings)
        self._fill()
        self._consider()
        early, self._early = self._early, []
        for name, message in early:
            self.received(name, message)

    def _release(self, standings: list[Standing], missing: list[int]) -> None:
        """All had finished: nobody needs the missing agents any more, and some may not have heard it."""
        assert self.coordinator is not None
        self.coordinator.state = State.ENDED
        self._order(Release(self.coordinator.generation))
        for seat in missing:
            self._node_ended(NodeEnded(seat, self._restarts, {}))
        for standing in standings:
            if standing.ended is not None:
                self._node_ended(NodeEnded(standing.seat, self._restarts, standing.ended))

    # ---- agents go

    def left(self, name: str, why: str) -> None:
        """An agent's connection has ended. Without a seat it is forgotten, else see Guard."""
        agent = self._agents.pop(name, None)
        if agent is not None and agent.seat >= 0:
            self._seats[agent.seat] = ""
            self._tree.parents.pop(agent.seat, None)
            if self._tree.needed:  # it may hang on another one, and its word of that be lost with it
                self._dropped.append(name)
            self._dissolve(agent.seat)
            self._suspect({agent.seat}, why)

    def _suspect(self, seats: set[int], why: str) -> None:
        self._hold()
        for seat in sorted(seats):
            self._suspects.append((seat, why))
            self.acts.append(Guard())

    def confirmed(self, count: int, now: float) -> None:
        """The directory has confirmed the term after the first ``count`` losses were reported."""
        suspects, self._suspects = self._suspects[:count], self._suspects[count:]
        for seat, _ in suspects:
            self._dismiss(seat)
        # others have come over since
        suspects = [(seat, why) for seat, why in suspects if not self._seats[seat]]
        if self._over:
            return
        if self.coordinator is None:  # the last coordinator's agents are still coming over
            self._given_up({seat for seat, _ in suspects})
            return
        self._since["vacant"] = now
        self._lose(suspects)
        if self.coordinator.state is State.ENDED:  # all have finished: it needs nobody any more
            for seat, _ in suspects:
                self._node_ended(NodeEnded(seat, self._restarts, {}))
        self._fill()
        self._consider()

    def _given_up(self, seats: set[int]) -> None:
        for seat in seats:
            self._standings.pop(seat, None)
            self._awaited.discard(seat)
        if not self._awaited:
            self._go_on()

    def _lose(self, seats: list[tuple[int, str]]) -> None:
        """These seats are vacant. One restart of the script is the answer to all of them."""
        restarts = self._restarts
        for seat, why in seats:
            if self._restarts == restarts:
                self._taken[seat] = True
                self.acts += [Heard(RankGone(rank, why, "", -1)) for rank in sorted(self._ranks(seat))]
                self._decide(NodeLost(seat, self._ranks(seat), why))

    def _fill(self) -> None:
        """Give vacant seats to spares of the same size."""
        if self.coordinator is None or self._over or self.coordinator.released or self.coordinator.resizing:
            return
        filled = {}
        for seat in self._vacant():
            spare = self._spare(len(self._ranks(seat)))
            if spare is not None:
                self._seats[seat], spare.seat = spare.name, seat
                filled[seat] = spare.address
        for seat, address in filled.items():
            ward = (seat - 1) % len(self._seats)
            if self._seats[ward] and ward not in filled:
                self._tell(self._seats[ward], Order(self._term, Reseated({seat: address})))
        for seat in filled:
            self._seat(seat, self._taken[seat])
            self._taken[seat] = False
        if filled and self.coordinator.state in (State.SETTLING, State.RESTORING):
            generation, state = self.coordinator.generation, self.coordinator.state.value
            self.acts.append(Perform(Deadline(generation, state, "join_timeout")))

    def _seat(self, seat: int, taken: bool, reason: str = "") -> None:
        assert self.coordinator is not None
        guardian = self._seats[(seat + 1) % len(self._seats)]
        address = self._agents[guardian].address if guardian and len(self._seats) > 1 else ""
        seated = Seated(
            self._term,
            seat,
            self.bases,
            self.world,
            self._store,
            address,
            self.coordinator.generation,
            self._restarts,
            taken,
            self._resizes,
            self.coordinator.kept if not taken and self.coordinator.fresh else -1,
            reason,
        )
        self._tell(self._seats[seat], seated)
        if taken and self.coordinator.state is not State.RUNNING:
            self._tell(self._seats[seat], Order(self._term, self.coordinator.freeze()))
        if (taken or self.coordinator.fresh) and self.coordinator.decision is not None:
            self._tell(self._seats[seat], Order(self._term, short(self.coordinator.decision)))

    def _vacant(self) -> list[int]:
        suspected = {seat for seat, _ in self._suspects}
        return [seat for seat, name in enumerate(self._seats) if not name and seat not in suspected]

    # ---- time

    def tick(self, now: float) -> None:
        """Look at what has a limit."""
        rules = self._rules
        if self._awaited and now - self._since["taking over"] > 2 * rules.detection:
            self._since["taking over"] = now
            self._suspect(self._awaited, "was lost with the coordinator")
        vacant = self._vacant()
        if self.coordinator is None:
            if not self.bases and now - self._since.get("gathering", now) > rules.timeout:
                here = len(self._agents)
                self._halt(f"{here} of {rules.active_nodes} nodes came within {rules.timeout:.0f} s", [])
        elif vacant and not self._over and not self.coordinator.released:
            waits = rules.loss_timeout if rules.on_loss is not OnLoss.FAIL else 0.0
            if now - self._since.setdefault("vacant", now) > waits:
                reason = f"no node has come for the lost node {vacant[0]} within {waits:.0f} s"
                self._halt(reason, sorted(self._ranks(vacant[0])))
        self._consider()

    def overdue(self, deadline: Overdue) -> None:
        """A limit that the coordinator set has passed. While a seat is vacant its replacements cannot arrive."""
        assert self.coordinator is not None
        if all(self._seats) or self.coordinator.state is State.FREEZING or self.coordinator.resizing:
            self._decide(deadline)

    # ---- agents say

    def received(self, name: str, message: Between) -> None:
        """A message of an agent with a seat."""
        agent = self._agents.get(name)
        if agent is not None and isinstance(message, Warm):
            agent.warm = True
        if agent is None or agent.seat < 0 or self._over:
            return
        if isinstance(message, Took) and message.generation == agent.takes:
            agent.takes = -1
        if agent.takes >= 0:
            return  # what it says is of ranks with other numbers
        if isinstance(message, (Bundle, AnswerBundle)):
            message = unbundled(message)
        if self.coordinator is None:
            self._early.append((name, message))
            return
        if isinstance(message, RankGone):
            self._note_loss(agent, message.rank)
        if isinstance(message, (RankStarted, RankExplained, RankGone, Gathered)):
            self.acts.append(Heard(message))
        event = event_of(message)
        if event is not None:
            self._decide(event)
        if isinstance(message, RankExited):
            if message.finished is not None:
                self.received(name, message.finished)
        elif isinstance(message, RankSays):
            self._said(message)
        elif isinstance(message, Pace):
            found = self.coordinator.paces.heard(message.ranks, self.coordinator.ranks)
            self.acts += [Perform(Warn(sentence)) for sentence in found]
        elif isinstance(message, NodeEnded) and message.restarts == self._restarts:
            self._node_ended(message)
        elif isinstance(message, Attached):
            self._attached(agent, message.parent)
        elif isinstance(message, Detached):
            self._detached(agent, message.parent)

    def _said(self, message: RankSays) -> None:
        assert self.coordinator is not None
        said = message.said
        if isinstance(said, Protected):
            self.coordinator.protect(message.rank)
        elif isinstance(said, Replicas):
            self.coordinator.holdings.compare(message.rank, said)
            self.acts.append(Heard(message))

    def _node_ended(self, message: NodeEnded) -> None:
        self._ended[message.seat] = message.bad
        if self._over:
            return
        if message.bad:
            how = ", ".join(f"rank {rank} with code {code}" for rank, code in sorted(message.bad.items()))
            self._halt(f"all ranks had finished, but these ended badly: {how}", sorted(message.bad))
        elif len(self._ended) == len(self._seats):
            self._over = True
            self._order(Done())

    # ---- the coordinator decides

    def _decide(self, event: Event) -> None:
        assert self.coordinator is not None
        try:
            actions = self.coordinator.handle(event)
        except ProtocolError as error:
            actions = [Restart(4, f"the ranks do not agree: {error}")]
        for action in actions:
            self._perform(action)

    def _perform(self, action: Action) -> None:
        assert self.coordinator is not None
        if isinstance(action, Broadcast):
            only = self.coordinator.pending if isinstance(action.message, Restore) else None
            self._order(action.message, only=only)  # type: ignore[arg-type]
            first = isinstance(action.message, Commit) and action.message.step < self.coordinator.first + 2
            if isinstance(action.message, Resume):
                self._dropped.clear()
            if self._tree.needed and (first or isinstance(action.message, Resume)):
                self._attach()
        elif isinstance(action, Replace):
            self._tell_rank(action.rank, ReplaceRank(action.rank, self._store))
        elif isinstance(action, End):
            self._tell_rank(action.rank, EndRank(action.rank, action.reason, action.stuck > 0))
            self.acts.append(Perform(action))
        elif isinstance(action, Restart):
            self._run_again(action)
        elif isinstance(action, Kept):
            self._kept(action)
        elif isinstance(action, Stop):
            self._halt(action.reason, list(action.ranks))
        elif not isinstance(action, Succeed):
            self.acts.append(Perform(action))
            if isinstance(action, Reached) and action.point == "committed":
                self._exclude_worst()
