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

from collections.abc import Callable

from checkpointless_elastic.protocol.acts import (
    Act,
    Guard,
    HangUp,
    Obey,
    Query,
    Tell,
)
from checkpointless_elastic.protocol.between import (
    AnswerBundle,
    Answers,
    Attach,
    Beat,
    Between,
    Bundle,
    Child,
    Done,
    EndRank,
    Gathered,
    Halt,
    Join,
    Order,
    ReplaceRank,
    Seated,
    Silent,
    Spare,
    Standing,
    Turned,
)
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.branch import BULK
from checkpointless_elastic.protocol.events import Overdue
from checkpointless_elastic.protocol.hanging import Hanging, Link, whole
from checkpointless_elastic.protocol.requests import (
    Declined,
    Dismissed,
    Drain,
    Drained,
    Inquiry,
    Leaving,
    Overview,
)
from checkpointless_elastic.protocol.rules import Rules
from checkpointless_elastic.protocol.seeker import Closed, Leader, Me, State

__all__ = ["Closed", "Me", "Member", "State"]


class Member(Hanging):
    """See the module. ``standing()``: of this agent's seat, None without one. ``open_store``: see Board.

    Attributes:
        state: see the module.
        board: of the coordinator, in state CHAIR.
    """

    def __init__(
        self, me: Me, rules: Rules, standing: Callable[[], Standing | None], open_store: Callable[[], str]
    ) -> None:
        super().__init__(me, rules, standing, open_store)
        self._followers: dict[str, int] = {}  # by agent, its newest accepted connection
        self._ticked: float | None = None
        self._held: list[tuple[str, Between | Closed | Overdue]] = []  # what came in doubt, by agent

    def _preside(self, now: float, old_seat: int = -1) -> None:
        standing = self._standing()
        self._leave_tree()
        self.state = State.CHAIR
        self.board = Board(self._leader.term, self._me.name, self._rules, self._open_store)
        self._leader.seat = standing.seat if standing else -1
        left_in, cause = self._farewell
        if cause and left_in == self._leader.term - 1:
            self.board.explain(old_seat, cause)
        if self._bases:
            self.board.take_over(self._bases, self._world, old_seat, now)
        self.board.join(self._introduction(standing), now)
        if not self._alone:
            self._beat(now)
        self._carry_out(now)

    # ---- connections

    def opened(self, link: int, agent: str, now: float) -> list[Act]:
        """A connection is there: dialled (positive), or accepted (negative) and about to bring a Join or Child."""
        self._links[link] = Link(now)
        if link == self._uplink:
            self.state = State.FOLLOWING
            self._send(link, self._introduction(self._standing()))
        elif link == self._branch.link:
            self._attached()
        else:
            self._links[link].agent = agent
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
        elif link == self._branch.link:
            self._detached(now)
        elif link in self._branch.children:
            agent = self._branch.dropped(link)
            if why is Closed.SILENT:
                self._send(self._uplink, Silent(agent))
        elif gone is not None and gone.agent:
            self._left(link, gone.agent, why, now)

    def _left(self, link: int, agent: str, why: Closed, now: float) -> None:
        if self._followers.get(agent) == link:
            del self._followers[agent]
        if self.board is not None:
            self._happened(agent, why, now)

    def _lost_uplink(self, why: Closed, reason: str, now: float) -> None:
        was = self.state
        self._leave_tree()
        self.state, self._uplink = State.SEEKING, 0
        if was is State.FOLLOWING:
            self._hold()
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
        elif link == self._branch.link:
            self._from_parent(message, now)
        elif link in self._branch.children:
            if isinstance(message, (Gathered, Answers, Bundle, AnswerBundle)):
                self._branch.said(link, message)
        elif self.board is not None:
            if isinstance(message, Join):
                self._replaces(self._followers.get(known.agent), now)
                self._followers[known.agent] = link
            if not isinstance(message, Beat):
                self._happened(known.agent, message, now)
        elif isinstance(message, Child) and self._takes(message):
            self._branch.children[link] = known.agent
        elif isinstance(message, (Join, Child)):
            self._acts.append(HangUp(link, "this agent does not coordinate"))
            self._forget(link)
        return self._flush()

    def _forget(self, link: int) -> None:
        agent = self._links.pop(link).agent
        if self._followers.get(agent) == link:
            del self._followers[agent]

    def _follow(self, message: Between, now: float) -> None:
        if isinstance(message, Beat):
            if message.term > self._leader.term:  # this agent had dialled it in its last term
                self._leader = Leader(message.term, self._leader.address, moved=now)
            if message.count > self._leader.count:
                self._leader.count, self._leader.moved = message.count, now
                for child in self._branch.children:
                    self._send(child, message)
            self._leader.seat = message.seat
        elif isinstance(message, Turned):
            self._turned(message)
        elif isinstance(message, Attach):
            self._attach(message.parent)
        else:
            self._obey(message, now)

    def _turned(self, message: Turned) -> None:
        self._leave_tree()
        self._acts.append(HangUp(self._uplink, "turned away"))
        self._links.pop(self._uplink, None)
        self._uplink = 0
        if message.fenced:
            self._give_way(message.reason)
            self._leader = Leader(self._leader.term - 1, "")  # comes back to the same one, as a new agent
            self._seek()
        else:
            self._end(f"The coordinator turned this agent away: {message.reason}.")

    def _obey(self, message: Between, now: float) -> None:
        """The coordinator's word to this agent."""
        if isinstance(message, (Spare, Seated)):
            self._stranger = None
            self._bases, self._world = message.bases, message.world
            self._acts.append(Obey(message))
        if isinstance(message, Seated):
            if self.board is not None:
                self._leader.seat = message.seat
                self._beat_all()  # who takes over must know which seat is lost with this agent
        elif isinstance(message, Turned):  # of the board in this agent: its seat is another's
            self._give_way(message.reason)
            self._leader.seat = -1
            if self.board is not None:
                self.board.join(self._introduction(None), now)
        elif isinstance(message, Order):
            if message.number and not self._pass_on(message):
                return
            self._acts.append(Obey(whole(message.message, self._world)))
            if isinstance(message.message, (Done, Halt)) and self.board is None:
                self.state = State.OUT
        elif isinstance(message, (ReplaceRank, EndRank)):
            self._acts.append(Obey(message))
        elif isinstance(message, Leaving):
            self._left_alone(message, now)
        elif isinstance(message, Dismissed):
            self._leave(message.cause, now)
            self._acts.append(Obey(message))

    # ---- clients

    def consult(
        self, question: Inquiry | Drain, now: float
    ) -> tuple[Overview | Drained | Declined, list[Act]]:
        """Answer a client, whose connection is none of the links. The answer is sent before the acts are performed."""
        answer: Overview | Drained | Declined
        if self.board is None:
            answer = Declined("this agent does not coordinate the job", True)
        elif self._in_doubt(now) or (isinstance(question, Drain) and self._store_failing is not None):
            answer = Declined("the rendezvous store has not confirmed who coordinates the job", True)
        else:
            answer = self.board.consult(question)
            self._carry_out(now)
        return answer, self._flush()

    # ---- this agent's own seat

    def report(self, message: Between, now: float) -> list[Act]:
        """This agent has something to say to the coordinator. While there is none, its standing says it later."""
        if self.board is not None:
            self._happened(self._me.name, message, now)
        elif self.state is State.FOLLOWING:
            if isinstance(message, Answers) or (isinstance(message, Gathered) and message.stage in BULK):
                self._branch.said(0, message)
            else:
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
        board = self.board
        assert board is not None
        if self._in_doubt(now):
            self._held.append((agent, what))
            if isinstance(what, (Closed, Leaving)):
                board.hold(what.agent if isinstance(what, Leaving) else agent)
                self._carry_out(now)
            return
        if isinstance(what, Overdue):
            board.overdue(what)
        elif isinstance(what, Closed):
            silent = f"gave no sign of life for {self._rules.detection:.1f} s"
            board.left(agent, silent if what is Closed.SILENT else "was lost")
        elif isinstance(what, Silent):
            self._silent(agent, what.agent, now)
        elif isinstance(what, Leaving):
            board.left(what.agent, what.cause)
        elif isinstance(what, Join):
            board.join(what, now)
            board.acts.append(Tell(agent, self._beat_now()))
        else:
            board.received(agent, what)
        self._carry_out(now)

    def _silent(self, parent: str, agent: str, now: float) -> None:
        """A child of an agent gives no sign of life."""
        link = self._followers.get(agent)
        if link is not None and self.board is not None and self.board.hangs_on(agent, parent):
            self._acts.append(HangUp(link, "no sign of life"))
            self._closed(link, Closed.SILENT, "no sign of life", now)

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
        self._leave_tree()
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
            if paused or (self.board is not None and self.board.is_attached(known.agent)):
                known.heard = now
            elif now - known.heard > self._patience(link):
                self._acts.append(HangUp(link, "no sign of life"))
                self._closed(link, Closed.SILENT, "no sign of life", now)
        if self.state is State.CHAIR and not self._alone:
            self._beat(now)
        elif self.state is State.FOLLOWING:
            self._up(Beat(self._leader.term, self._leader.count, -1))
            for child in self._branch.children:
                self._send(child, self._beat_now())
        elif self.state is State.SEEKING and self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._ask(self._retry, self._leader.term)
        if self.board is not None and not self._doubt:
            self.board.tick(now)
            self._carry_out(now)
        return self._flush()

    def _patience(self, link: int) -> float:
        """Of the coordinator an agent in the tree hears through others, one of which may have to be found silent."""
        tree = link == self._uplink and self._branch.link
        return (2 if tree else 1) * self._rules.detection

    def _beat(self, now: float) -> None:
        self._leader.count += 1
        self._ask(Query.BEAT, self._leader.term, self._leader.count)
        self._beat_all()

    def _beat_all(self) -> None:
        for link, known in self._links.items():
            attached = self.board is not None and self.board.is_attached(known.agent)
            if link < 0 and not attached:
                self._send(link, self._beat_now())

    def _beat_now(self) -> Beat:
        return Beat(self._leader.term, self._leader.count, self._leader.seat)
