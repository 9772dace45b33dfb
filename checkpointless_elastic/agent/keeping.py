"""The guardian's side of mirrors: takes those of another node's ranks, gives them to the agent that takes its seat."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.copies import fill, give
from checkpointless_elastic.agent.shelf import Book, Shelf
from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.errors import CheckpointlessError, ProtocolError
from checkpointless_elastic.protocol.guarding import Bulk, Copy, Done, Get, Large, OnBulk, Put, Recall, Sent

__all__ = ["Keeping"]

logger = logging.getLogger(__name__)


class Keeping:
    """Serves connections for mirrors, each on a thread of its own. Methods belong to the loop.

    ``keeps(rank, generation)``: see `membership.Office`. ``arrived(rank)``: there is a new mirror of this rank.
    ``copied(copy)``: a large copy of private state has come. ``kept(rank)``: any thread, the copy that is kept.
    """

    def __init__(
        self,
        run_dir: str,
        keeps: Callable[[int, int], bool],
        arrived: Callable[[int], None],
        copied: Callable[[Copy], None],
        kept: Callable[[int], Copy | None],
    ) -> None:
        self.shelf = Shelf(run_dir)
        self._keeps, self._arrived = keeps, arrived
        self._copied, self._kept = copied, kept
        self._wires: set[Wire] = set()

    def serve(self, wire: Wire, bell: Bell) -> None:
        """Do what is asked for on this connection, as long as it lasts."""
        self._wires.add(wire)
        threading.Thread(
            target=self._serve, args=(wire, bell), name="checkpointless-keeping", daemon=True
        ).start()

    def _serve(self, wire: Wire, bell: Bell) -> None:
        """On a thread."""
        try:
            wire.send(Bulk())
            while True:
                self._answer(wire, wire.receive(idle=True), bell)
        except (OSError, CheckpointlessError) as error:
            logger.debug("a connection for mirrors has ended: %s", error)
        finally:
            wire.close()
            bell.ring(functools.partial(self._wires.discard, wire))

    def _answer(self, wire: Wire, message: OnBulk, bell: Bell) -> None:
        if isinstance(message, Put):
            _receive(
                wire, self.shelf, message, lambda book: bell.ring(functools.partial(self._take, wire, book))
            )
        elif isinstance(message, Get):
            _give(wire, self.shelf, message)
        elif isinstance(message, Large):
            fill(wire, message, lambda copy: bell.ring(functools.partial(self._take_copy, wire, copy)))
        elif isinstance(message, Recall):
            give(wire, message, self._kept)
        else:
            raise ProtocolError(f"{type(message).__name__} came where a mirror begins")

    def _take_copy(self, wire: Wire, copy: Copy) -> None:
        if wire in self._wires:
            self._copied(copy)

    def _take(self, wire: Wire, book: Book) -> None:
        """All of a mirror has come."""
        put = book.put
        if wire not in self._wires or not self._keeps(put.rank, put.generation):
            self.shelf.drop(book)  # this agent, or the other one, has lost its seat
        elif self.shelf.keep(book):
            logger.debug("[rank %d] its mirror of step %d is kept here", put.rank, book.step)
            self._arrived(put.rank)

    def end(self) -> None:
        """Nothing is taken or given any more."""
        for wire in self._wires:
            wire.end()
        self._wires.clear()


def _receive(wire: Wire, shelf: Shelf, put: Put, came: Callable[[Book], None]) -> None:
    if shelf.has(put.rank, put.version):
        wire.send(Done(here=True))
        return
    try:
        book = shelf.begin(put)
    except OSError as error:
        wire.send(Done(f"{error}; enlarge the shared memory of each node, or set mirror_every=0"))
        return
    whole = False
    try:
        wire.send(Done())
        for memory in book.memory():
            wire.receive_into(memory)
        sent = wire.receive()
        whole = isinstance(sent, Sent) and sent.whole
    finally:
        if not whole:
            shelf.drop(book)
    if whole:
        came(book)


def _give(wire: Wire, shelf: Shelf, asked: Get) -> None:
    with shelf.reading(asked.ranks, asked.step) as books:
        for book in books:
            wire.send(book.put)
            for memory in book.memory():
                wire.send_memory(memory)
            wire.send(Sent(True))
    wire.send(Done())
