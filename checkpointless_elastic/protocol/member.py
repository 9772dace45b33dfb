"""An agent's membership of the job: how it finds the coordinator, follows it, loses it, and becomes it.

    SEEKING    asks the directory who coordinates; claims the next term if nobody does, or who did is gone
    DIALLING   connects to the coordinator and says who it is
    FOLLOWING  takes orders, with or without a seat
    CHAIR      coordinates (`Board`); its own agent is served without a connection
    OUT        the job has ended for it

A *term* is one coordinator's time; terms only go up, and the directory gives each to one agent. Who coordinates writes
a count there with each heartbeat and sends it to its followers. A follower that hears nothing compares the two: if the
count in the directory has not moved either, the coordinator is gone and the follower claims the next term; if it has,
the follower is the one that is cut off, and it ends its workers, since its seat will be given to another.

Like all of this package it does no input or output. Its caller performs the acts that each method returns, in order,
and calls `tick` once per heartbeat. `now` is monotonic, in seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpointless_elastic.protocol.acts import (
    Act,
    Ask,
    Dial,
    Fail,
    Guard,
    HangUp,
    Obey,
    Query,
    Tell,
    Transmit,
    Yield,
)
from checkpointless_elastic.protocol.between import (
    VERSION,
    Beat,
    Between,
    Done,
    EndRank,
    Halt,
    Join,
    Order,
    ReplaceRank,
    Seated,
    Spare,
    Standing,
    Turned,
)
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.events import Overdue
from checkpointless_elastic.protocol.layout import runs
from checkpointless_elastic.protocol.rules import Rules

__all__ = ["Closed", "Me", "Member", "State"]


class State(enum.Enum):
    """See the module."""

    SEEKING = "seeking"
    DIALLING = "dialling"
    FOLLOWING = "following"
    CHAIR = "chair"
    OUT = "out"


class Closed(enum.Enum):
    """Why a connection ended."""

    REFUSED = "refused"  # its machine answers, nobody listens there
    GONE = "gone"  # closed or reset by the peer
    SILENT = "silent"  # no answer, or no sign of life, in time
    REJECTED = "rejected"  # the peer is not who it should be, or does not accept this agent


@dataclass(frozen=True)
class Me:
    """This agent: its name for this life, where it listens, and how many workers it runs."""

    name: str
    address: str
    size: int


@dataclass
class _Link:
    """One connection. ``agent``: whose it is; '' until that is known."""

    heard: float
    agent: str = ""


@dataclass
class _Leader:
    """The coordinator that is followed, was, or is looked for. ``count``: its newest beat, seen at ``moved``."""

    term: int = 0
    address: str = ""
    seat: int = -1
    count: int = 0
    moved: float = 0.0
    links: list[int] = field(default_factory=list)


class Member:
    """See the module. ``standing()``: of this agent's seat, None without one. ``open_store``: see Board.

    Attributes:
        board: of the coordinator, in state CHAIR.
        seated: does this agent have a seat?
    """

    def __init__(
        self, me: Me, rules: Rules, standing: Callable[[], Standing | None], open_store: Callable[[], str]
    ) -> None:
        self.state = State.SEEKING
        self.board: Board | None = None
        self._me, self._rules = me, rules
        self._standing, self._open_store = standing, open_store
        self._leader = _Leader()
        self._links: dict[int, _Link] = {}
        self._followers: dict[str, int] = {}  # by agent, its newest accepted connection
        self._uplink = 0
        self._dialled = 0
        self._retry_at: float | None = None  # when to look again, in state SEEKING ...
        self._retry = Query.NEWEST  # ... and for what
        self._bases: list[int] = []
        self._world = 0
        self._guards = 0  # losses that the directory has not yet confirmed ...
        self._guarded = 0  # ... and of these, those for which it is being asked
        self._alone = rules.max_nodes == 1
        self._ticked: float | None = None
        self._asked = 0  # guards that the directory has not answered
        self._doubt = False  # after a pause of this process: does another one coordinate?
        self._held: list[
            tuple[str, Between | Closed | Overdue]
        ] = []  # what came meanwhile, and of which agent
        self._stranger: float | None = None  # since when no coordinator is found, knowing nothing of the job
        self._store_failing: float | None = None
        self._acts: list[Act] = []

    @property
    def term(self) -> int:
        """The newest term that is known."""
        return self._leader.term

    # ---- finding the coordinator

    def begin(self, now: float) -> list[Act]:
        """The first call."""
        if self._alone:
            self._leader = _Leader(1, self._me.address)
            self._preside(now)
        else:
            self._ask(Query.NEWEST)
        return self._flush()

    def found(self, term: int, address: str, verdict: str, now: float) -> list[Act]:
        """The directory's answer to NEWEST; term 0: no coordinator yet. ``verdict``: how the job has ended."""
        self._store_failing = None
        if (
            verdict and self.state is State.CHAIR
        ):  # it was won when the last coordinator had just ended the job
            self.board = None
            self._end(f"The job has {verdict}.")
        if self.state is not State.SEEKING:
            return self._flush()
        if verdict:
            self._end(f"The job has {verdict}.")
        elif address == self._me.address:
            self._is_mine(term)
        elif term > self._leader.term:
            self._leader = _Leader(term, address, count=-1, moved=now)
            self._dial()
        elif term == 0:
            self._ask(Query.CLAIM, 1)
        elif self._leader.count < 0:  # the one that could not be reached at first
            self._ask(Query.LAST_BEAT, term)
        else:
            self._dial()
        return self._flush()

    def _is_mine(self, term: int) -> None:
        """The newest term is this agent's: it has not heard that it won it, or does not coordinate any more."""
        if term > self._leader.term:
            self._ask(Query.CLAIM, term)
        else:
            self._ask(Query.LAST_BEAT, term)

    def claimed(self, term: int, won: bool, now: float) -> list[Act]:
        """The directory's answer to CLAIM."""
        if self.state is State.SEEKING and won:
            old = self._leader
            self._leader = _Leader(term, self._me.address, moved=now)
            self._preside(now, old.seat)
            self._ask(Query.NEWEST)
        elif self.state is State.SEEKING:
            self._ask(Query.NEWEST)
        return self._flush()

    def last_beat(self, count: int, now: float) -> list[Act]:
        """The directory's answer to LAST_BEAT: has the coordinator that cannot be reached moved since it was heard?"""
        self._store_failing = None
        leader = self._leader
        if self.state is not State.SEEKING:
            return self._flush()
        if count > leader.count + 1:
            if leader.count >= 0:
                self._give_way("the coordinator lives and cannot be reached from here")
            leader.count, leader.moved = count, now
            self._retry_at, self._retry = now + self._rules.detection, Query.NEWEST
        elif now - leader.moved >= self._rules.detection:
            self._succeed(now)
        else:
            self._retry_at, self._retry = leader.moved + self._rules.detection, Query.LAST_BEAT
        return self._flush()

    def _succeed(self, now: float) -> None:
        """The coordinator is gone. Who knows nothing of the job leaves it for a while to those that do."""
        if self._stranger is None:
            self._stranger = now
        if self._bases or now - self._stranger >= 3 * self._rules.detection:
            self._ask(Query.CLAIM, self._leader.term + 1)
        else:
            self._retry_at, self._retry = now + self._rules.heartbeat, Query.NEWEST

    def store_failed(self, query: Query, reason: str, now: float) -> list[Act]:
        """The directory could not be asked. A coordinator goes on without it until an agent is lost."""
        self._guarded = 0
        self._asked -= query is Query.GUARD
        self._store_failing = self._store_failing if self._store_failing is not None else now
        if self.state in (State.SEEKING, State.DIALLING):
            if now - self._store_failing >= self._rules.store_patience:
                self._end(f"No coordinator can be reached, and neither can the store: {reason}")
            elif self.state is State.SEEKING:
                self._retry_at, self._retry = now + self._rules.heartbeat, Query.NEWEST
        elif (self._guards or self._doubt) and now - self._store_failing >= self._rules.store_patience:
            self._end(
                f"An agent is lost, and no seat may be given away while the store cannot be reached: {reason}"
            )
        return self._flush()

    def _dial(self) -> None:
        self.state = State.DIALLING
        self._dialled += 1
        self._uplink = self._dialled
        self._acts.append(Dial(self._uplink, self._leader.address))

    def _seek(self) -> None:
        self.state, self._uplink = State.SEEKING, 0
        self._ask(Query.NEWEST)

    def _preside(self, now: float, old_seat: int = -1) -> None:
        standing = self._standing()
        self.state = State.CHAIR
        self.board = Board(self._leader.term, self._me.name, self._rules, self._open_store)
        self._leader.seat = standing.seat if standing else -1
        if self._bases:
            self.board.take_over(self._bases, self._world, old_seat, now)
        self.board.join(self._introduction(standing), now)
        if not self._alone:
            self._beat(now)
        self._carry_out(now)

    def _introduction(self, standing: Standing | None) -> Join:
        me, nodes = self._me, runs(self._bases, self._world)
        return Join(VERSION, me.name, me.address, me.size, standing, nodes)

    # ---- connections

    def opened(self, link: int, agent: str, now: float) -> list[Act]:
        """A connection is there: dialled (positive), or accepted (negative) and about to bring a Join."""
        self._links[link] = _Link(now)
        if link == self._uplink:
            self.state = State.FOLLOWING
            self._send(link, self._introduction(self._standing()))
        else:
            self._links[link].agent = agent
            self._replaces(self._followers.get(agent), now)
            self._followers[agent] = link
        return self._flush()

    def _replaces(self, older: int | None, now: float) -> None:
        """An agent has connected anew before it was seen that its last connection is broken."""
        if older is not None:
            self._acts.append(HangUp(older, "this agent has connected again"))
            self._closed(older, Closed.GONE, "connected again", now)

    def closed(self, link: int, why: Closed, reason: str, now: float) -> list[Act]:
        """A connection has ended, or could not be made."""
        self._closed(link, why, reason, now)
        return self._flush()

    def _closed(self, link: int, why: Closed, reason: str, now: float) -> None:
        gone = self._links.pop(link, None)
        if link == self._uplink:
            self._lost_uplink(why, reason, now)
        elif gone is not None and gone.agent:
            self._left(link, gone.agent, why, now)

    def _left(self, link: int, agent: str, why: Closed, now: float) -> None:
        if self._followers.get(agent) == link:
            del self._followers[agent]
        if self.board is not None:
            self._happened(agent, why, now)

    def _lost_uplink(self, why: Closed, reason: str, now: float) -> None:
        was = self.state
        self.state, self._uplink = State.SEEKING, 0
        if was is State.FOLLOWING:
            self._ask(Query.NEWEST) if why is Closed.GONE else self._ask(Query.LAST_BEAT, self._leader.term)
        elif why is Closed.REJECTED:
            self._end(f"The coordinator at {self._leader.address} does not accept this agent: {reason}")
        elif why is Closed.REFUSED:  # its machine is there, its process is not
            self._succeed(now)
        else:
            self._ask(Query.LAST_BEAT, self._leader.term)

    def received(self, link: int, message: Between, now: float) -> list[Act]:
        """A message has come."""
        known = self._links.get(link)
        if known is None:
            return []
        known.heard = now
        if link == self._uplink:
            self._follow(message, now)
        elif self.board is not None:
            if not isinstance(message, Beat):
                self._happened(known.agent, message, now)
        elif isinstance(message, Join):
            self._acts.append(HangUp(link, "this agent does not coordinate"))
            self._forget(link)
        return self._flush()

    def _forget(self, link: int) -> None:
        agent = self._links.pop(link).agent
        if self._followers.get(agent) == link:
            del self._followers[agent]

    def _follow(self, message: Between, now: float) -> None:
        if isinstance(message, Beat):
            if message.count > self._leader.count:
                self._leader.count, self._leader.moved = message.count, now
            self._leader.seat = message.seat
        elif isinstance(message, Turned):
            self._turned(message)
        else:
            self._obey(message, now)

    def _turned(self, message: Turned) -> None:
        self._acts.append(HangUp(self._uplink, "turned away"))
        self._links.pop(self._uplink, None)
        self._uplink = 0
        if message.fenced:
            self._give_way(message.reason)
            self._leader = _Leader(self._leader.term - 1, "")  # comes back to the same one, as a new agent
            self._seek()
        else:
            self._end(f"The coordinator turned this agent away: {message.reason}.")

    def _obey(self, message: Between, now: float) -> None:
        """The coordinator's word to this agent."""
        if isinstance(message, (Spare, Seated)):
            self._stranger = None
            self._bases, self._world = message.bases, message.world
        if isinstance(message, Seated):
            self._acts.append(Obey(message))
            if self.board is not None:
                self._leader.seat = message.seat
        elif isinstance(message, Turned):  # of the board in this agent: its seat is another's
            self._give_way(message.reason)
            self._leader.seat = -1
            if self.board is not None:
                self.board.join(self._introduction(None), now)
        elif isinstance(message, Order):
            self._acts.append(Obey(message.message))
            if isinstance(message.message, (Done, Halt)) and self.board is None:
                self.state = State.OUT
        elif isinstance(message, (ReplaceRank, EndRank)):
            self._acts.append(Obey(message))

    def _give_way(self, reason: str) -> None:
        if self._standing() is not None:
            self._acts.append(Yield(reason))

    # ---- this agent's own seat

    def report(self, message: Between, now: float) -> list[Act]:
        """This agent has something to say to the coordinator. While there is none, its standing says it later."""
        if self.board is not None:
            self._happened(self._me.name, message, now)
        elif self.state is State.FOLLOWING:
            self._send(self._uplink, message)
        return self._flush()

    def overdue(self, deadline: Overdue, now: float) -> list[Act]:
        """A limit that was asked for has passed."""
        if self.board is not None and self.board.coordinator is not None:
            self._happened("", deadline, now)
        return self._flush()

    # ---- coordinating

    def _happened(self, agent: str, what: Between | Closed | Overdue, now: float) -> None:
        """Something for the board, of this agent."""
        if self._in_doubt(now):
            self._held.append((agent, what))
            return
        board = self.board
        assert board is not None
        if isinstance(what, Overdue):
            board.overdue(what)
        elif isinstance(what, Closed):
            silent = f"gave no sign of life for {self._rules.detection:.1f} s"
            board.left(agent, silent if what is Closed.SILENT else "was lost")
        elif isinstance(what, Join):
            board.join(what, now)
            board.acts.append(Tell(agent, self._beat_now()))
        else:
            board.received(agent, what)
        self._carry_out(now)

    def _in_doubt(self, now: float) -> bool:
        """Was this process stopped? Nothing is decided then before the directory has confirmed the term."""
        paused = self._ticked is not None and now - self._ticked > self._rules.detection / 2
        if paused and not self._doubt and self.board is not None and not self._alone:
            self._doubt = True
            self._ask(Query.GUARD, self._leader.term, self._leader.count)
        return self._doubt

    def beaten(self, newest: bool, now: float) -> list[Act]:
        """The directory's answer to BEAT: is this term the newest?"""
        self._store_failing = None
        if self.board is not None and not newest:
            self._step_down("another agent coordinates the job")
        elif self.board is not None:
            if self._doubt and not self._asked:  # the directory did not answer that
                self._ask(Query.GUARD, self._leader.term, self._leader.count)
            self._guard()
        return self._flush()

    def guarded(self, newest: bool, now: float) -> list[Act]:
        """The directory's answer to GUARD: may the seats of lost agents be given away?"""
        self._store_failing = None
        self._asked -= 1
        count, self._guarded = self._guarded, 0
        if self.board is not None and not newest:
            self._step_down("another agent coordinates the job")
        elif self.board is not None and self._in_doubt(now):
            self._certain(now)
        elif self.board is not None:
            self._guards -= count
            self.board.confirmed(count, now)
            self._carry_out(now)
            self._guard()
        return self._flush()

    def _certain(self, now: float) -> None:
        """The term is the newest. But if most agents have left meanwhile, they look for another coordinator."""
        if self._asked:  # the answer may be older than the pause
            return
        assert self.board is not None
        self._doubt, held, self._held = False, self._held, []
        self._ticked = now
        gone = sum(isinstance(what, Closed) for _, what in held)
        if 2 * gone > len(self.board.bases) - 1 > 0:
            self._step_down("this agent was stopped, and the others have left it")
        for agent, what in held:
            if self.board is not None:
                self._happened(agent, what, now)
        self._guard()

    def _step_down(self, reason: str) -> None:
        self.board = None
        self._guards = self._guarded = 0
        self._doubt, self._held = False, []
        for link in [link for link in self._links if link < 0]:
            self._acts.append(HangUp(link, "this agent does not coordinate any more"))
            self._forget(link)
        self._give_way(reason)
        self._seek()

    def _carry_out(self, now: float) -> None:
        """Do what the board wants."""
        board = self.board
        while board is not None and board.acts:
            acts, board.acts = board.acts, []
            for act in acts:
                if isinstance(act, Tell):
                    self._tell(act, now)
                elif isinstance(act, Guard):
                    self._guards += 1
                    self._guard()
                else:
                    self._acts.append(act)

    def _guard(self) -> None:
        if self._guards and not self._guarded and not self._doubt:
            self._guarded = self._guards
            self._ask(Query.GUARD, self._leader.term, self._leader.count)

    def _tell(self, act: Tell, now: float) -> None:
        if act.agent == self._me.name:
            self._obey(act.message, now)
            return
        link = self._followers.get(act.agent)
        if link is not None:
            self._send(link, act.message)

    # ---- time

    def tick(self, now: float) -> list[Act]:
        """One heartbeat. After a pause of this process the others get their time before they are taken to be gone."""
        paused = self._ticked is not None and now - self._ticked > self._rules.detection
        self._in_doubt(now)
        self._ticked = now
        for link, known in list(self._links.items()):
            if paused:
                known.heard = now
            elif now - known.heard > self._rules.detection:
                self._acts.append(HangUp(link, "no sign of life"))
                self._closed(link, Closed.SILENT, "no sign of life", now)
        if self.state is State.CHAIR and not self._alone:
            self._beat(now)
        elif self.state is State.FOLLOWING:
            self._send(self._uplink, Beat(self._leader.term, self._leader.count, -1))
        elif self.state is State.SEEKING and self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._ask(self._retry, self._leader.term)
        if self.board is not None and not self._doubt:
            self.board.tick(now)
            self._carry_out(now)
        return self._flush()

    def _beat(self, now: float) -> None:
        self._leader.count += 1
        self._ask(Query.BEAT, self._leader.term, self._leader.count)
        for link in self._links:
            if link < 0:
                self._send(link, self._beat_now())

    def _beat_now(self) -> Beat:
        return Beat(self._leader.term, self._leader.count, self._leader.seat)

    # ---- acts

    def _ask(self, query: Query, term: int = 0, count: int = 0) -> None:
        self._asked += query is Query.GUARD
        self._acts.append(Ask(query, term, count))

    def _send(self, link: int, message: Between) -> None:
        self._acts.append(Transmit(link, message))

    def _end(self, reason: str) -> None:
        self.state = State.OUT
        self._acts.append(Fail(reason))

    def _flush(self) -> list[Act]:
        acts, self._acts = self._acts, []
        return acts
