"""How an agent finds the coordinator and becomes it: the part of `member` that asks the directory.

A follower that hears nothing compares the count that the coordinator writes into the directory with the newest one it
heard: if the count has not moved either, the coordinator is gone; if it has, the follower is the one that is cut off.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpointless_elastic.protocol.acts import Act, Ask, Dial, Fail, Obey, Query, Transmit, Yield
from checkpointless_elastic.protocol.between import VERSION, Between, Join, Standing
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.layout import runs
from checkpointless_elastic.protocol.messages import Hold
from checkpointless_elastic.protocol.rules import Rules

__all__ = ["Closed", "Me", "Seeker", "State"]


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
class Leader:
    """The coordinator that is followed, was, or is looked for. ``count``: its newest beat, seen at ``moved``."""

    term: int = 0
    address: str = ""
    seat: int = -1
    count: int = 0
    moved: float = 0.0
    links: list[int] = field(default_factory=list)


class Seeker(ABC):
    """See the module; base of `member.Member`, which has the attributes' meaning."""

    def __init__(
        self, me: Me, rules: Rules, standing: Callable[[], Standing | None], open_store: Callable[[], str]
    ) -> None:
        self.state = State.SEEKING
        self.board: Board | None = None
        self._me, self._rules = me, rules
        self._standing, self._open_store = standing, open_store
        self._leader = Leader()
        self._uplink = 0
        self._dialled = 0
        self._retry_at: float | None = None  # when to look again, in state SEEKING ...
        self._retry = Query.NEWEST  # ... and for what
        self._bases: list[int] = []
        self._world = 0
        self._guards = 0  # losses that the directory has not yet confirmed ...
        self._guarded = 0  # ... and of these, those for which it is being asked
        self._asked = 0  # guards that the directory has not answered
        self._doubt = False  # after a pause of this process: does another one coordinate?
        self._stranger: float | None = None  # since when no coordinator is found, knowing nothing of the job
        self._alone = rules.max_nodes == 1
        self._store_failing: float | None = None
        self._acts: list[Act] = []

    @property
    def term(self) -> int:
        """The newest term that is known."""
        return self._leader.term

    @abstractmethod
    def _preside(self, now: float, old_seat: int = -1) -> None:
        """Coordinate: the term is this agent's."""

    # ---- finding the coordinator

    def begin(self, now: float) -> list[Act]:
        """The first call."""
        if self._alone:
            self._leader = Leader(1, self._me.address)
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
            self._leader = Leader(term, address, count=-1, moved=now)
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
            self._leader = Leader(term, self._me.address, moved=now)
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

    def _introduction(self, standing: Standing | None) -> Join:
        me, nodes = self._me, runs(self._bases, self._world)
        return Join(VERSION, me.name, me.address, me.size, standing, nodes)

    def _give_way(self, reason: str) -> None:
        if self._standing() is not None:
            self._acts.append(Yield(reason))

    def _hold(self) -> None:
        """The coordinator is out of reach: workers wait for the next one's Freeze, or are ended."""
        if (standing := self._standing()) is not None:
            self._acts.append(Obey(Hold(standing.generation)))

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
