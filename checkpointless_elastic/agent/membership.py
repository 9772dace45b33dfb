"""Runs this agent's part of the protocol between agents: connections, directory and heartbeats of `protocol.member`."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.descriptors import make_room
from checkpointless_elastic.agent.directory import Directory, Leader
from checkpointless_elastic.agent.peers import Closed, Identity, Peer, Peers
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.agent.wards import Keeper, Wards
from checkpointless_elastic.errors import DirectoryError
from checkpointless_elastic.protocol import member
from checkpointless_elastic.protocol.acts import (
    Act,
    Ask,
    Dial,
    Fail,
    HangUp,
    Heard,
    Obey,
    Perform,
    Query,
    Transmit,
    Word,
    Yield,
)
from checkpointless_elastic.protocol.between import (
    Answers,
    Between,
    Child,
    Join,
    Ordered,
    Seated,
    Standing,
    decode,
)
from checkpointless_elastic.protocol.events import Action, Overdue
from checkpointless_elastic.protocol.guarding import Kept
from checkpointless_elastic.protocol.holdings import Holdings
from checkpointless_elastic.protocol.member import Me, Member
from checkpointless_elastic.protocol.messages import Decision, Freeze, Mismatch, Report, encode_body
from checkpointless_elastic.protocol.requests import Drain, Inquiry
from checkpointless_elastic.protocol.rules import Rules

__all__ = ["Membership", "Network", "Office"]

logger = logging.getLogger(__name__)

LINGER_S = 5.0
"""How long the coordinator waits for others to take its last word."""

_WHY = {
    Closed.REFUSED: member.Closed.REFUSED,
    Closed.GONE: member.Closed.GONE,
    Closed.TIMEOUT: member.Closed.SILENT,
    Closed.REJECTED: member.Closed.REJECTED,
}


class Office(Protocol):
    """What the membership needs of its agent. Called on the loop's thread; must not block."""

    run_dir: str

    def obey(self, message: Word) -> None:
        """The coordinator's word to this agent."""

    def perform(self, action: Action) -> None:
        """In the coordinator's agent: a deadline, or a point for the timeline."""

    def heard(self, message: Between) -> None:
        """In the coordinator's agent: what some agent said, for the timeline."""

    def give_way(self, reason: str) -> None:
        """End all workers: the seat is another's."""

    def cannot_go_on(self, reason: str) -> None:
        """This agent's part in the job is over."""

    def standing(self) -> Standing | None:
        """See `protocol.member`."""

    def open_store(self) -> str:
        """See `protocol.board`."""

    def keeps(self, rank: int, generation: int) -> bool:
        """May a copy of this generation be kept of another node's rank?"""

    def copied(self, rank: int, generation: int, step: int) -> None:
        """A rank of another node has its private state here."""


class Network:
    """What several nodes need: who this agent is, where it listens, how it finds the others."""

    def __init__(self, identity: Identity, host: str, directory: Callable[[], Directory]) -> None:
        self.identity, self.host, self.directory = identity, host, directory


class Membership:
    """See the module. Without a network the job has one node, and nothing is opened."""

    def __init__(
        self, loop: EventLoop, rules: Rules, size: int, office: Office, network: Network | None
    ) -> None:
        self._loop, self._rules, self._office = loop, rules, office
        self._queue: deque[Act] = deque()
        self._performing = False
        self._peers: Peers | None = None
        self._links: dict[int, Peer] = {}
        self._numbers: dict[Peer, int] = {}
        self._accepted = 0  # number of the newest accepted link: they are negative
        self._bell = Bell(loop) if network is not None else None
        self._keeper = Keeper(office.run_dir, office.keeps, office.copied, self._bell)
        self._lost: list[int] = []  # ranks, as the newest Freeze said
        self._wards: Wards | None = None
        me = Me("alone", "", size)
        if network is not None:
            make_room(rules.max_nodes)
            self._peers = Peers(
                loop,
                network.identity,
                (network.host, 0),
                opened=self._opened,
                take=self._take,
                closed=self._closed,
                limit=rules.detection,
            )
            me = Me(network.identity.agent, f"{network.host}:{self._peers.port}", size)
            self._clerk = _Clerk(loop, me, network.directory, self._answered)
        self._member = Member(me, rules, office.standing, office.open_store)
        self._chairs = False
        self._closed_for_good = False

    # ---- for the agent

    def begin(self) -> None:
        """Take part."""
        self._do(self._member.begin(time.monotonic()))
        if self._peers is not None:
            self._tick()

    def report(self, message: Between) -> None:
        """Say something to the coordinator."""
        if isinstance(message, Answers):
            message = msgspec.structs.replace(message, mirrored=self._keeper.mirrored(self._lost))
        self._do(self._member.report(message, time.monotonic()))

    def overdue(self, deadline: Overdue) -> None:
        """A deadline that was asked for has passed."""
        self._do(self._member.overdue(deadline, time.monotonic()))

    def leave(self, cause: str) -> None:
        """This process ends: say so."""
        self._do(self._member.leave(cause, time.monotonic()))

    @property
    def coordinates(self) -> bool:
        """Is this the coordinator's agent?"""
        return self._member.board is not None

    def take_seat(
        self,
        seat: Seated,
        ranks: frozenset[int],
        fetched: Callable[[Kept], None],
        say: Callable[[int, Report | Mismatch], None],
    ) -> Wards | None:
        """This agent has a seat now: keep its private state with the guardian. None with one seat. See `Wards`."""
        if self._peers is not None and self._bell is not None and len(seat.bases) > 1:
            run_dir = self._office.run_dir
            self._wards = Wards(self._loop, self._bell, self._peers, run_dir, seat, ranks, fetched, say)
            self._keeper.recall()
        return self._wards

    def ordered(self, message: Ordered) -> None:
        """The coordinator has ordered this: what it means for what guardians keep."""
        if isinstance(message, Freeze):
            self._lost = message.lost
        elif isinstance(message, Decision):
            self._keeper.decided(message)
            if self._wards is not None:
                self._wards.decided(message)

    def leave_seat(self, generation: int = sys.maxsize) -> None:
        """The seat is given up, or the script is run again: what is kept from before this generation is void."""
        if self._wards is not None:
            self._wards.close()
            self._wards = None
        if generation == sys.maxsize:
            self._keeper.close()
        self._keeper.forget(generation)

    def close(self, verdict: str) -> None:
        """This agent takes no part any more. ``verdict``: of the job, empty if it goes on without this agent.

        Blocks: the coordinator's last word must reach the others first.
        """
        if self._peers is None or self._closed_for_good:
            return
        if self.coordinates and verdict:
            self._clerk.ask(Ask(Query.END, verdict=verdict))
            self._loop.run(lambda: not any(number < 0 for number in self._links), LINGER_S)
        self._closed_for_good = True
        if self._wards is not None:
            self._wards.close()
        self._keeper.close()
        self._peers.close()
        self._clerk.close()

    # ---- acts

    def _do(self, acts: list[Act]) -> None:
        """Perform in order; what an act brings about is performed after those that are under way."""
        if self._closed_for_good:
            return
        self._queue.extend(acts)
        if self._performing:
            return
        self._performing = True
        try:
            while self._queue and not self._closed_for_good:
                self._perform(self._queue.popleft())
        finally:
            self._performing = False
        if self.coordinates and not self._chairs and self._peers is not None:
            logger.info("[term %d] this agent coordinates the job", self._member.term)
        self._chairs = self.coordinates

    def _perform(self, act: Act) -> None:
        office = self._office
        if isinstance(act, Obey):
            office.obey(act.message)
        elif isinstance(act, Transmit):
            peer = self._links.get(act.link)
            if peer is not None:
                peer.send(encode_body(act.message))
        elif isinstance(act, Perform):
            office.perform(act.action)
        elif isinstance(act, Heard):
            office.heard(act.message)
        elif isinstance(act, Ask):
            self._clerk.ask(act)
        elif isinstance(act, Dial):
            assert self._peers is not None
            self._know(act.link, self._peers.connect(act.address))
        elif isinstance(act, HangUp):
            self._hang_up(act)
        elif isinstance(act, Yield):
            office.give_way(act.reason)
        elif isinstance(act, Fail):
            office.cannot_go_on(act.reason)

    def _know(self, link: int, peer: Peer) -> None:
        self._links[link], self._numbers[peer] = peer, link

    def _hang_up(self, act: HangUp) -> None:
        peer = self._links.pop(act.link, None)
        if peer is not None:
            del self._numbers[peer]
            peer.close(act.reason)

    # ---- connections

    def _opened(self, peer: Peer) -> None:
        if self._wards is not None and self._wards.owns(peer):
            self._wards.opened(peer)
        elif peer in self._numbers:
            self._do(self._member.opened(self._numbers[peer], peer.agent, time.monotonic()))

    def _take(self, peer: Peer, body: bytes) -> None:
        message = decode(body)
        if self._wards is not None and self._wards.owns(peer):
            self._wards.received(peer, message)
            return
        if peer not in self._numbers:
            if isinstance(message, (Inquiry, Drain)):
                self._answer_client(peer, message)
                return
            if not isinstance(message, (Join, Child)):
                self._keeper.received(peer, message)
                return
            self._accepted -= 1
            self._know(self._accepted, peer)
            self._do(self._member.opened(self._numbers[peer], peer.agent, time.monotonic()))
        if peer in self._numbers:
            self._do(self._member.received(self._numbers[peer], message, time.monotonic()))

    def _answer_client(self, peer: Peer, question: Inquiry | Drain) -> None:
        answer, acts = self._member.consult(question, time.monotonic())
        peer.send(encode_body(answer))
        if isinstance(question, Drain):
            logger.warning("%s wants the node of %s drained: %s", peer.agent, question.agent, answer)
        self._do(acts)

    def _closed(self, peer: Peer, reason: str) -> None:
        if self._wards is not None and self._wards.owns(peer):
            self._wards.closed(peer, reason)
        elif peer in self._numbers:
            link = self._numbers.pop(peer)
            del self._links[link]
            assert peer.how is not None
            self._do(self._member.closed(link, _WHY[peer.how], reason, time.monotonic()))

    # ---- directory and time

    def _answered(self, ask: Ask, answer: object) -> None:
        now, it = time.monotonic(), self._member
        if isinstance(answer, DirectoryError):
            acts = it.store_failed(ask.query, str(answer), now)
        elif ask.query is Query.NEWEST:
            assert isinstance(answer, _Newest)
            leader, verdict = answer
            acts = it.found(leader.term if leader else 0, leader.address if leader else "", verdict, now)
        elif ask.query is Query.CLAIM:
            acts = it.claimed(ask.term, bool(answer), now)
        elif ask.query is Query.LAST_BEAT:
            acts = it.last_beat(int(answer), now)  # type: ignore[call-overload]
        elif ask.query is Query.GUARD:
            acts = it.guarded(bool(answer), now)
        elif ask.query is Query.BEAT:
            acts = it.beaten(bool(answer), now)
        else:
            acts = []
        self._do(acts)

    def _tick(self) -> None:
        if self._closed_for_good:
            return
        self._loop.call_later(self._rules.heartbeat, self._tick)
        self._do(self._member.tick(time.monotonic()))

    # ---- for the timeline

    def is_pending(self, rank: int) -> bool:
        """In the coordinator's agent: is this rank a replacement that has not joined?"""
        board = self._member.board
        return board is not None and board.coordinator is not None and rank in board.coordinator.pending

    @property
    def nodes(self) -> int:
        """In the coordinator's agent: how many there are with workers."""
        return len(self._member.board.bases) if self._member.board is not None else 0

    def holdings(self) -> Holdings | None:
        """In the coordinator's agent: what ranks have said that they hold."""
        board = self._member.board
        return board.coordinator.holdings if board is not None and board.coordinator is not None else None


class _Newest(NamedTuple):
    leader: Leader | None
    verdict: str


class _Clerk:
    """Asks the directory on a thread of its own, one question after the other; answers come on the loop."""

    def __init__(
        self,
        loop: EventLoop,
        me: Me,
        directory: Callable[[], Directory],
        answered: Callable[[Ask, object], None],
    ) -> None:
        self._loop, self._me, self._open, self._answered = loop, me, directory, answered
        self._questions: queue.SimpleQueue[Ask | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Ask, object]] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._bell, self._deliver)
        self._thread = threading.Thread(target=self._work, name="checkpointless-directory", daemon=True)
        self._thread.start()

    def ask(self, ask: Ask) -> None:
        """The answer follows."""
        self._questions.put(ask)

    def close(self) -> None:
        """Answer what was asked, for at most LINGER_S, and end."""
        self._questions.put(None)
        self._thread.join(LINGER_S)
        self._loop.unwatch(self._bell)

    def _deliver(self) -> None:
        os.eventfd_read(self._bell)
        while not self._answers.empty():
            self._answered(*self._answers.get())

    def _work(self) -> None:
        directory: Directory | None = None
        while (ask := self._questions.get()) is not None:
            answer: object
            try:
                directory = directory or self._open()
                answer = _ask(directory, ask, self._me)
            except DirectoryError as error:
                answer = error
            except Exception as error:  # without an answer the agent would wait for ever
                answer = DirectoryError(f"{type(error).__name__}: {error}")
            self._answers.put((ask, answer))
            os.eventfd_write(self._bell, 1)
        if directory is not None:
            directory.close()


def _ask(directory: Directory, ask: Ask, me: Me) -> object:
    if ask.query is Query.NEWEST:
        return _Newest(directory.newest(), directory.verdict())
    if ask.query is Query.CLAIM:
        return directory.claim(Leader(ask.term, me.name, me.address))
    if ask.query is Query.LAST_BEAT:
        return directory.last_beat(ask.term)
    if ask.query is Query.END:
        return directory.end(ask.verdict)
    return directory.beat(ask.term, ask.count)
