"""Copies of private state on another node.

What only one rank knows of its step stands in its slot, in memory of its own node. So that it outlives the node, each
agent sends it to its *guardian*, the agent of the next seat, whenever a rank is ready; the guardian's node is ready for
that step only when it has it (`protocol.node`). An agent that takes a lost agent's seat gets the copies from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpointless_elastic.agent.peers import Peer, Peers
from checkpointless_elastic.agent.runtime import EventLoop, Timer
from checkpointless_elastic.protocol.between import Between, Seated
from checkpointless_elastic.protocol.messages import Report, encode_body
from checkpointless_elastic.protocol.warding import Copy, Kept, Lacking, Ward
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.private import slot_path

__all__ = ["Keeper", "Wards", "put_back"]

logger = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Until the next try to reach a guardian."""


def put_back(run_dir: str, copies: list[Copy]) -> None:
    """Write what a guardian has kept into the slots of its ranks."""
    for copy in copies:
        with Slot.open(slot_path(run_dir, copy.rank)) as slot:
            slot.write(copy.blob, copy.parts)
            for entry in copy.log or []:
                slot.append(entry)


class Keeper:
    """The guardian's side: what is kept of another's ranks. ``copied(rank, generation, step)`` tells of a copy."""

    def __init__(self, keeps: Callable[[int, int], bool], copied: Callable[[int, int, int], None]) -> None:
        self._keeps, self._copied = keeps, copied
        self._kept: dict[int, Copy] = {}
        self._from: dict[int, Peer] = {}  # by rank, the agent that has its seat

    def received(self, peer: Peer, message: Between) -> None:
        """A message of an agent whose guardian this one is, or was: one that lost its seat may not know it yet."""
        if isinstance(message, Ward):
            self._from.update(dict.fromkeys(message.ranks, peer))
            if message.wants:
                kept = [self._kept[rank] for rank in message.ranks if rank in self._kept]
                peer.send(encode_body(Kept(kept)))
        elif isinstance(message, Copy) and self._from.get(message.rank) is peer:
            if self._keeps(message.rank, message.generation) and not self._keep(message):
                peer.send(encode_body(Lacking(message.rank)))

    def _keep(self, message: Copy) -> bool:
        """False: parts are missing; what the copy builds on was refused, or forgotten with the seat of this agent."""
        known = self._kept.get(message.rank)
        have = {**known.parts, **message.parts} if known is not None else message.parts
        if not have.keys() >= set(message.numbers):
            return False
        log = message.log if message.log is not None or known is None else known.log
        parts = {number: have[number] for number in message.numbers}
        self._kept[message.rank] = Copy(
            message.rank, message.generation, message.step, message.blob, message.numbers, parts, log
        )
        self._copied(message.rank, message.generation, message.step)
        return True

    def forget(self, generation: int) -> None:
        """What is from before this generation does not count any more."""
        self._kept = {rank: copy for rank, copy in self._kept.items() if copy.generation >= generation}

    def recall(self) -> None:
        """Tell of all copies that are here."""
        for copy in self._kept.values():
            self._copied(copy.rank, copy.generation, copy.step)


@dataclass
class _Sent:
    """What the guardian has of one rank."""

    numbers: set[int] = field(default_factory=set)
    log: int = -1  # entries of the startup log


class Wards:
    """The ward's side, for the ranks of this node while it has a seat.

    ``fetched(copies)``: what the guardian had, once, if the seat was taken over.
    """

    def __init__(
        self,
        loop: EventLoop,
        peers: Peers,
        run_dir: str,
        seat: Seated,
        ranks: frozenset[int],
        fetched: Callable[[list[Copy]], None],
    ) -> None:
        self._loop, self._peers, self._run_dir = loop, peers, run_dir
        self._seat, self._ranks = seat, ranks
        self._fetched: Callable[[list[Copy]], None] | None = fetched if seat.taken else None
        self._peer: Peer | None = None
        self._address = ""
        self._again: Timer | None = None
        self._sent: dict[int, _Sent] = {}
        self._ready: dict[int, tuple[int, int]] = {}  # generation and step that each rank was last ready for
        self.move(seat.guardian)

    def move(self, address: str) -> None:
        """The guardian's seat has a new agent."""
        self.close()
        self._address = address
        if address:  # else that seat is vacant now
            self._peer = self._peers.connect(address)

    def owns(self, peer: Peer) -> bool:
        """Is this the connection to the guardian?"""
        return peer is self._peer

    def opened(self) -> None:
        """The guardian is there: it gets everything anew."""
        assert self._peer is not None
        self._sent = {}
        self._send(Ward(self._seat.seat, sorted(self._ranks), self._fetched is not None))
        for rank, (generation, step) in self._ready.items():
            self._copy(rank, generation, step)

    def received(self, message: Between) -> None:
        """A message of the guardian."""
        if isinstance(message, Kept) and self._fetched is not None:
            fetched, self._fetched = self._fetched, None
            fetched(message.copies)
        elif isinstance(message, Lacking) and message.rank in self._ready:
            self._sent.pop(message.rank, None)
            self._copy(message.rank, *self._ready[message.rank])

    def closed(self, reason: str) -> None:
        """The guardian is gone, and the coordinator names its successor; or only the connection is."""
        logger.info("The guardian of seat %d cannot be reached (%s).", self._seat.seat, reason)
        self._peer = None
        self._again = self._loop.call_later(AGAIN_S, lambda: self.move(self._address))

    def ready(self, rank: int, report: Report) -> None:
        """A rank is ready: copy what its replacement would need, before anybody is told."""
        self._ready[rank] = report.generation, report.step
        if self._peer is not None and self._peer.is_open:
            self._copy(rank, report.generation, report.step)

    def _copy(self, rank: int, generation: int, step: int) -> None:
        sent = self._sent.setdefault(rank, _Sent())
        with Slot.open(slot_path(self._run_dir, rank)) as slot:
            content = slot.read()
            log = slot.entries() if sent.log < 0 else None
        if content is None:
            return
        parts = {number: part for number, part in content.parts.items() if number not in sent.numbers}
        sent.numbers, sent.log = set(content.parts), 0
        self._send(Copy(rank, generation, step, content.blob, list(content.parts), parts, log))

    def _send(self, message: Between) -> None:
        assert self._peer is not None
        self._peer.send(encode_body(message))

    def close(self) -> None:
        """The seat is given up, or has another guardian."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._peer is not None:
            self._peer.close("the guardian is another one")
            self._peer = None
