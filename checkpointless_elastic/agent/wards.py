"""Copies of private state on another node.

What only one rank knows of its step stands in its slot, in memory of its own node. So that it outlives the node, each
agent sends it to its *guardian*, the agent of the next seat, whenever a rank is ready; the guardian's node is ready for
that step only when it has it (`protocol.node`). An agent that takes a lost agent's seat gets the copies from there.
What is said here of copies holds for mirrors too, but these have connections of their own (`agent.mirrors`). Copies
that are too large for a message go there as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.copies import SMALL, Job, gathered, size
from checkpointless_elastic.agent.fetching import Fetching
from checkpointless_elastic.agent.keeping import Keeping
from checkpointless_elastic.agent.mirrors import Line, Sender
from checkpointless_elastic.agent.peers import Peer, Peers
from checkpointless_elastic.agent.returns import Returns
from checkpointless_elastic.agent.runtime import EventLoop, Timer
from checkpointless_elastic.protocol.between import Between, Seated
from checkpointless_elastic.protocol.guarding import NONE, Bulk, Copy, Holds, Kept, Lacking, Ward
from checkpointless_elastic.protocol.messages import (
    Decision,
    FromWorker,
    Mirrored,
    Mismatch,
    Replicas,
    Report,
    Stage,
    encode_body,
)
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.private import slot_path

__all__ = ["Keeper", "PuttingBack", "Wards"]

logger = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Until the next try to reach a guardian."""


class PuttingBack:
    """Writes what a guardian has kept into the slots of its ranks: into those that are there now, whatever follows."""

    def __init__(self, run_dir: str, copies: list[Copy]) -> None:
        self._slots = [(copy, Slot.open(slot_path(run_dir, copy.rank))) for copy in copies]

    def run(self) -> None:
        """Any thread, once. OSError if the shared memory is full."""
        for copy, slot in self._slots:
            with slot:
                slot.write(copy.blob, copy.parts)
                for entry in copy.log or []:
                    slot.append(entry)


class Keeper:
    """The guardian's side: what is kept of another's ranks.

    ``copied(rank, generation, step)`` tells of a copy, once the mirror is here too that the rank had then.
    """

    def __init__(
        self,
        run_dir: str,
        keeps: Callable[[int, int], bool],
        copied: Callable[[int, int, int], None],
        bell: Bell | None = None,
    ) -> None:
        self._keeps, self._copied, self._bell = keeps, copied, bell
        self._keeping = Keeping(run_dir, keeps, self._look, self._take, lambda rank: self._kept.get(rank))
        self._kept: dict[int, Copy] = {}
        self._held: dict[int, Replicas] = {}
        self._from: dict[int, Peer] = {}  # by rank, the agent that has its seat

    def received(self, peer: Peer, message: Between) -> None:
        """A message of an agent whose guardian this one is, or was: one that lost its seat may not know it yet."""
        if isinstance(message, Ward):
            self._from.update(dict.fromkeys(message.ranks, peer))
            if message.wants:
                kept = [self._kept[rank] for rank in message.ranks if rank in self._kept]
                held = {rank: self._held[rank] for rank in message.ranks if rank in self._held}
                peer.send(encode_body(_message(kept, held)))
        elif isinstance(message, Holds) and self._from.get(message.rank) is peer:
            self._held[message.rank] = message.held
        elif isinstance(message, Bulk) and self._bell is not None:
            self._keeping.serve(peer.detach(), self._bell)
        elif isinstance(message, Copy) and self._from.get(message.rank) is peer:
            self._take(message)

    def _take(self, message: Copy) -> None:
        """A copy has come."""
        if not self._keeps(message.rank, message.generation) or self._keep(message):
            return
        if (peer := self._from.get(message.rank)) is not None:
            peer.send(encode_body(Lacking(message.rank)))

    def _keep(self, message: Copy) -> bool:
        """False: parts are missing; what the copy builds on was refused, or forgotten with the seat of this agent."""
        known = self._kept.get(message.rank)
        if known is not None and (known.generation, known.step) > (message.generation, message.step):
            return True  # a large one, which a later one has overtaken
        have = {**known.parts, **message.parts} if known is not None else message.parts
        if not have.keys() >= set(message.numbers):
            return False
        log = message.log if message.log is not None or known is None else known.log
        parts = {number: have[number] for number in message.numbers}
        self._kept[message.rank] = msgspec.structs.replace(message, parts=parts, log=log)
        self._look(message.rank)
        return True

    def _look(self, rank: int) -> None:
        """Is all here that this rank's copy needs?"""
        copy = self._kept.get(rank)
        if copy is not None and (copy.mirror == NONE or self._keeping.shelf.has(rank, copy.mirror)):
            self._copied(copy.rank, copy.generation, copy.step)

    def decided(self, decision: Decision) -> None:
        """All go on at this step: later mirrors do not count."""
        self._keeping.shelf.decided(decision.generation, decision.step)

    def mirrored(self, ranks: Iterable[int]) -> dict[int, int]:
        """Of those of these ranks of which mirrors are here, the step of the newest one."""
        return self._keeping.shelf.newest(ranks)

    def forget(self, generation: int) -> None:
        """What is from before this generation does not count any more."""
        self._kept = {rank: copy for rank, copy in self._kept.items() if copy.generation >= generation}
        self._held.clear()
        self._keeping.shelf.forget(generation)

    def close(self) -> None:
        """This agent has no seat any more: it is nobody's guardian."""
        self._keeping.end()

    def recall(self) -> None:
        """Tell of all copies that are here."""
        for rank in list(self._kept):
            self._look(rank)


def _message(copies: list[Copy], held: dict[int, Replicas]) -> Kept:
    """What fits goes along; the rest is to be asked for."""
    small: list[Copy] = []
    room = SMALL
    for copy in sorted(copies, key=size):
        room -= size(copy)
        if room >= 0:
            small.append(copy)
    taken = {copy.rank for copy in small}
    return Kept(small, held, [copy.rank for copy in copies if copy.rank not in taken])


@dataclass
class _Sent:
    """What the guardian has of one rank."""

    numbers: set[int] = field(default_factory=set)
    log: int = -1  # entries of the startup log


class Wards:
    """The ward's side, for the ranks of this node while it has a seat.

    ``fetched(kept)``: what the guardian had, once, if the seat was taken over. ``say(rank, message)``: a worker's
    report that was kept back, see `heard`, or that its private state cannot be kept.
    """

    def __init__(
        self,
        loop: EventLoop,
        bell: Bell,
        peers: Peers,
        run_dir: str,
        seat: Seated,
        ranks: frozenset[int],
        fetched: Callable[[Kept], None],
        say: Callable[[int, Report | Mismatch], None],
    ) -> None:
        self._mirrors = Sender(
            bell, peers, run_dir, seat.generation, self._again_without_mirror, self._copied
        )
        self._fetch = Fetching(bell, peers, self._arrived, self._fetch_again)
        self._say = say
        self._returns = Returns(bell, peers, run_dir, ranks, say)
        self._loop, self._peers, self._run_dir = loop, peers, run_dir
        self._seat, self._ranks = seat, ranks
        self._fetched: Callable[[Kept], None] | None = fetched if seat.taken else None
        self._peer: Peer | None = None
        self._address = ""
        self._again: Timer | None = None
        self._sent: dict[int, _Sent] = {}
        self._held: dict[int, Replicas] = {}
        self._ready: dict[int, tuple[int, int]] = {}  # generation and step that each rank was last ready for
        self.move(seat.guardian)
        if self._fetched is None:
            self._returns.allow()

    def move(self, address: str) -> None:
        """The guardian's seat has a new agent."""
        self._connect(address)
        self._mirrors.move(address)
        self._returns.move(address)

    def _connect(self, address: str) -> None:
        self._hang_up()
        self._fetch.close()
        self._address = address
        if address:  # else that seat is vacant now
            self._peer = self._peers.connect(address)

    def owns(self, peer: Peer) -> bool:
        """Is this a connection to the guardian?"""
        return peer is self._peer or self._line(peer) is not None

    def _line(self, peer: Peer) -> Line | None:
        return self._mirrors.line(peer) or self._returns.line(peer) or self._fetch.line(peer)

    def opened(self, peer: Peer) -> None:
        """The guardian is there: it gets everything anew."""
        if (line := self._line(peer)) is not None:
            line.opened()
            return
        self._sent = {}
        self._send(Ward(self._seat.seat, sorted(self._ranks), self._fetched is not None))
        for rank, held in self._held.items():
            self._send(Holds(rank, held))
        for rank, (generation, step) in self._ready.items():
            self._copy(rank, generation, step)

    def received(self, peer: Peer, message: Between) -> None:
        """A message of the guardian."""
        if (line := self._line(peer)) is not None:
            line.received(message)
        elif isinstance(message, Kept) and self._fetched is not None:
            if message.large:
                self._fetch.begin(self._address, message)
            else:
                self._arrived(message)
        elif isinstance(message, Lacking) and message.rank in self._ready:
            self._sent.pop(message.rank, None)
            self._copy(message.rank, *self._ready[message.rank])

    def _arrived(self, kept: Kept) -> None:
        """All is here that the guardian had."""
        if self._fetched is not None:
            fetched, self._fetched = self._fetched, None
            self._held = kept.held
            fetched(kept)
            self._returns.allow()

    def _fetch_again(self) -> None:
        """As long as the guardian is there, and the coordinator's limit has not passed."""
        if self._fetched is not None and self._peer is not None and self._peer.is_open:
            self._send(Ward(self._seat.seat, sorted(self._ranks), True))

    def closed(self, peer: Peer, reason: str) -> None:
        """The guardian is gone, and the coordinator names its successor; or only the connection is."""
        if (line := self._line(peer)) is not None:
            line.closed(reason)
            return
        logger.info("The guardian of seat %d cannot be reached (%s).", self._seat.seat, reason)
        self._peer = None
        self._again = self._loop.call_later(AGAIN_S, lambda: self._connect(self._address))

    def heard(self, rank: int, message: FromWorker) -> bool:
        """A worker has said this. True: the coordinator must not hear it now."""
        if isinstance(message, Mirrored):
            self._mirrors.told(rank, (message.step, message.generation))
        elif isinstance(message, Report) and message.stage is Stage.READY:
            self._is_ready(rank, message)
        elif isinstance(message, Replicas):
            self._held[rank] = message
            if self._peer is not None and self._peer.is_open:
                self._send(Holds(rank, message))
        return isinstance(message, Report) and self._returns.holds(rank, message)

    def decided(self, decision: Decision) -> None:
        """All go on at this step, some of them from their mirrors."""
        self._mirrors.seen(decision.generation)
        self._returns.decided(decision)

    def _is_ready(self, rank: int, report: Report) -> None:
        """A rank is ready: copy what its replacement would need, before anybody is told."""
        self._ready[rank] = report.generation, report.step
        if self._peer is not None and self._peer.is_open:
            self._copy(rank, report.generation, report.step)

    def _again_without_mirror(self, rank: int) -> None:
        """The guardian does not get the mirror that it was told to wait for."""
        if rank in self._ready and self._peer is not None and self._peer.is_open:
            self._copy(rank, *self._ready[rank])

    def _copy(self, rank: int, generation: int, step: int) -> None:
        assert self._peer is not None
        sent = self._sent.setdefault(rank, _Sent())
        mirror = self._mirrors.version(rank)
        job = Job(rank, generation, step, frozenset(sent.numbers), sent.log < 0, mirror)
        with Slot.open(slot_path(self._run_dir, rank)) as slot:
            large = slot.room(job.log) + self._peer.waiting > SMALL
            copy = None if large else gathered(slot, job)
        if large:
            self._mirrors.copy(job)
        elif copy is not None:
            sent.numbers, sent.log = set(copy.numbers), 0
            self._send(copy)

    def _copied(self, job: Job, copy: Copy | None, reason: str) -> None:
        """A large copy has been sent, or cannot be kept."""
        if reason:
            self._say(job.rank, Mismatch(f"its private state cannot be kept on another node: {reason}"))
        elif copy is not None and job.rank in self._sent:
            self._sent[job.rank] = _Sent(set(copy.numbers), 0)  # if it has not, the guardian asks for all

    def _send(self, message: Between) -> None:
        assert self._peer is not None
        self._peer.send(encode_body(message))

    def close(self) -> None:
        """The seat is given up."""
        self._hang_up()
        self._fetch.close()
        self._mirrors.close()
        self._returns.close()

    def _hang_up(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._peer is not None:
            self._peer.close("the guardian is another one")
            self._peer = None
