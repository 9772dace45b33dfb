"""How mirrors come to the guardian of a node and back: agent to agent, on connections and threads of their own.

Agents do it, not workers: an agent outlives its workers and has their mirrors in its shared memory, it knows its
guardian and can prove who it is, and a rank that is lost in the middle of a step takes no transfer with it. On the
other side no worker is needed either, which would have to stay alive for as long as its memory is another one's.

A mirror is sent as soon as its worker says that it is whole, while the step is computed. The guardian's node is ready
for a step only when it has the newest mirror of each rank that it keeps (`agent.wards`). Private state that is too
large for a message goes the same way (`agent.copies`).
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterable

import msgspec

from checkpointless_elastic.agent import copies
from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.copies import Job
from checkpointless_elastic.agent.peers import Peer, Peers
from checkpointless_elastic.agent.runtime import Timer
from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.between import Between
from checkpointless_elastic.protocol.guarding import NONE, Bulk, Copy, Done, Get, Put, Sent, Version
from checkpointless_elastic.protocol.messages import encode_body
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.mirror_files import install, is_whole, outgoing, room
from checkpointless_elastic.worker.private import slot_path

__all__ = ["Line", "Outbox", "Sender", "get"]

logger = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Until the next try to reach a guardian."""
TRIES = 20
"""Connections that fail one after the other before mirrors are given up until the guardian is another one: a step waits
for them meanwhile."""


class Line:
    """Connects to a guardian for mirrors. ``ready(wire)`` or ``failed(reason)`` comes once, on the loop."""

    def __init__(
        self, peers: Peers, address: str, ready: Callable[[Wire], None], failed: Callable[[str], None]
    ) -> None:
        self._ready, self._failed = ready, failed
        self._peer: Peer | None = peers.connect(address)

    def owns(self, peer: Peer) -> bool:
        """Is this its connection?"""
        return peer is self._peer

    def opened(self) -> None:
        """The guardian is there."""
        assert self._peer is not None
        self._peer.send(encode_body(Bulk()))

    def received(self, message: Between) -> None:
        """The guardian's word: the connection is a thread's there."""
        assert self._peer is not None
        if not isinstance(message, Bulk):
            raise ProtocolError(f"A guardian answered Bulk with {type(message).__name__}.")
        peer, self._peer = self._peer, None
        try:
            wire = peer.detach()
        except ProtocolError as error:
            self._failed(str(error))
        else:
            self._ready(wire)

    def closed(self, reason: str) -> None:
        """The guardian cannot be reached."""
        self._peer = None
        self._failed(reason)

    def close(self) -> None:
        """Nobody waits for it any more."""
        if self._peer is not None:
            self._peer.close("it is not needed any more")
            self._peer = None


class Outbox:
    """Sends mirrors over one wire, on a thread of its own.

    On the loop: ``missed(rank, version, reason)`` when one was not sent whole; with a reason the guardian cannot take
    it, else it was given up by its worker. ``copied(job, copy, reason)``: a copy was sent; with a reason it cannot be
    kept. ``failed(reason)``: the connection has ended.
    """

    def __init__(
        self,
        wire: Wire,
        run_dir: str,
        bell: Bell,
        missed: Callable[[int, Version, str], None],
        copied: Callable[[Job, Copy | None, str], None],
        failed: Callable[[str], None],
    ) -> None:
        self._wire, self._run_dir, self._bell = wire, run_dir, bell
        self._missed, self._copied, self._failed = missed, copied, failed
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="checkpointless-mirrors", daemon=True).start()

    def put(self, rank: int, version: Version, generation: int) -> None:
        """Send this mirror after those that were asked for."""
        self._jobs.put(functools.partial(self._take, rank, version, generation))

    def copy(self, job: Job) -> None:
        """Send this copy after what was asked for."""
        self._jobs.put(functools.partial(self._copy, job))

    def end(self) -> None:
        """Whatever is being sent ends torn."""
        self._jobs.put(None)
        self._wire.end()

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
        except Exception as error:  # whatever it is, a step waits for what is sent here
            self._bell.ring(functools.partial(self._failed, str(error) or type(error).__name__))
        finally:
            self._wire.close()

    def _copy(self, job: Job) -> None:
        copy: Copy | None = None
        try:
            with Slot.open(slot_path(self._run_dir, job.rank)) as slot:
                copy = copies.gathered(slot, job)
        except MemoryError:
            reason = f"this node has no memory to send the private state of rank {job.rank}"
        else:
            reason = copies.send(self._wire, copy) if copy is not None else ""
        # the bytes themselves need not wait for the loop
        bare = copy and msgspec.structs.replace(copy, blob=b"", parts={}, log=None)
        self._bell.ring(functools.partial(self._copied, job, bare, reason))

    def _take(self, rank: int, version: Version, generation: int) -> None:
        found = outgoing(self._run_dir, rank, version, generation)
        answer = Done() if found is None else self._announce(found[0])
        if answer.here:
            return
        if found is None or answer.reason or not self._send(*found):
            self._bell.ring(functools.partial(self._missed, rank, version, answer.reason))

    def _announce(self, put: Put) -> Done:
        """Does the guardian wait for the bytes?"""
        self._wire.send(put)
        answer = self._wire.receive()
        if not isinstance(answer, Done):
            raise ProtocolError(f"A guardian answered Put with {type(answer).__name__}.")
        return answer

    def _send(self, put: Put, paths: list[str]) -> bool:
        for path, nbytes in zip(paths, put.sizes, strict=True):
            self._wire.send_file(path, nbytes)
        whole = is_whole(self._run_dir, put)
        self._wire.send(Sent(whole))
        return whole


class Sender:
    """The ward's side: has the newest mirror of each rank of a node sent to its guardian.

    ``released(rank)``: a mirror is not to be waited for any more, see `version`. ``copied(job, copy, reason)``: see
    Outbox.
    """

    def __init__(
        self,
        bell: Bell,
        peers: Peers,
        run_dir: str,
        generation: int,
        released: Callable[[int], None],
        copied: Callable[[Job, Copy | None, str], None],
    ) -> None:
        self._bell, self._peers, self._run_dir = bell, peers, run_dir
        self._generation, self._released, self._copied = generation, released, copied
        self._copies: dict[int, Job] = {}  # by rank, those that are not known to have arrived
        self._newest: dict[int, Version] = {}
        self._given_up: set[int] = set()  # ranks whose mirrors this guardian does not get
        self._address = ""
        self._line: Line | None = None
        self._outbox: Outbox | None = None
        self._again: Timer | None = None
        self._failures = 0

    def line(self, peer: Peer) -> Line | None:
        """What this connection belongs to, if it is one of these."""
        return self._line if self._line is not None and self._line.owns(peer) else None

    def version(self, rank: int) -> Version:
        """The mirror of this rank that the guardian must have before the next step is committed."""
        return NONE if rank in self._given_up else self._newest.get(rank, NONE)

    def seen(self, generation: int) -> None:
        """This generation is in force."""
        self._generation = max(self._generation, generation)

    def told(self, rank: int, version: Version) -> None:
        """A worker has a new mirror."""
        self._newest[rank] = version
        if version != NONE and rank not in self._given_up:
            self._send(rank)

    def move(self, address: str) -> None:
        """The guardian is another one: it gets everything anew. Empty: there is none now."""
        self.close()
        self._address, self._failures = address, 0
        self._given_up.clear()
        self._copies.clear()
        self._send_all()

    def copy(self, job: Job) -> None:
        """Send a copy of private state, instead of an older one of this rank that has not gone yet."""
        self._copies[job.rank] = job
        if self._outbox is not None:
            self._outbox.copy(job)
        else:
            self._connect()

    def close(self) -> None:
        """Nothing is sent from now on."""
        if self._again is not None:
            self._again.cancel()
        if self._line is not None:
            self._line.close()
        if self._outbox is not None:
            self._outbox.end()
        self._again = self._line = self._outbox = None

    def _send(self, rank: int) -> None:
        if self._outbox is not None:
            self._outbox.put(rank, self._newest[rank], self._generation)
        else:
            self._connect()

    def _connect(self) -> None:
        if self._address and self._line is None and self._again is None:
            self._line = Line(self._peers, self._address, self._connected, self._lost)

    def _connected(self, wire: Wire) -> None:
        self._line = None
        outbox = self._outbox = Outbox(
            wire,
            self._run_dir,
            self._bell,
            lambda *what: self._missed(*what) if self._outbox is outbox else None,
            lambda *what: self._sent(*what) if self._outbox is outbox else None,
            lambda reason: self._lost(reason) if self._outbox is outbox else None,
        )
        self._send_all()

    def _send_all(self) -> None:
        for rank, version in self._newest.items():
            if version != NONE and rank not in self._given_up:
                self._send(rank)
        for job in self._copies.values():
            if self._outbox is not None:
                self._outbox.copy(job)
            else:
                self._connect()

    def _sent(self, job: Job, copy: Copy | None, reason: str) -> None:
        self._failures = 0
        if self._copies.get(job.rank) is job:
            del self._copies[job.rank]
        self._copied(job, copy, reason)

    def _missed(self, rank: int, version: Version, reason: str) -> None:
        if reason:
            self._given_up.add(rank)
            logger.error(
                "[rank %d] its mirror of step %d is on no other node, nor will later ones be: %s",
                rank,
                version[0],
                reason,
            )
        elif self._newest.get(rank) == version:
            self._newest[rank] = NONE  # the worker that wrote it is gone, and the next one says what it has
        self._released(rank)

    def _lost(self, reason: str) -> None:
        self._line = self._outbox = None
        self._failures += 1
        if self._failures < TRIES:
            self._again = self._peers.loop.call_later(AGAIN_S, self._try_again)
            return
        logger.error(
            "The guardian of this node takes no mirrors (%s): until it is another one, a loss of this node cannot be "
            "answered from them.",
            reason,
        )
        self._given_up = set(self._newest)
        for rank in self._given_up:
            self._released(rank)
        jobs, self._copies = self._copies, {}
        for job in jobs.values():
            self._copied(job, None, f"the guardian of this node does not take it ({reason})")

    def _try_again(self) -> None:
        self._again = None
        self._send_all()


def get(wire: Wire, run_dir: str, ranks: Iterable[int], step: int) -> None:
    """Get the mirrors of a step back that a guardian has of these ranks, into this node's shared memory. Blocks.

    Raises OSError when the guardian is gone or there is no room, CheckpointlessError when it sends what it must not.
    """
    wire.send(Get(sorted(ranks), step))
    while isinstance(message := wire.receive(), Put):
        files = room(run_dir, message)
        for segment in files:
            wire.receive_into(segment.memory())
        sent = wire.receive()
        if isinstance(sent, Sent) and sent.whole:
            install(run_dir, message, files)
    if not isinstance(message, Done):
        raise ProtocolError(f"A guardian answered Get with {type(message).__name__}.")
