"""Connections between the agents of a job: whole messages both ways, between agents that have proven who they are.

Everything happens on the event loop's thread and nothing blocks. Whoever cannot prove that it belongs to the job costs
a bounded amount of memory, descriptors, time and log lines.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from checkpointless_elastic.agent.channel import Channel, Channels
from checkpointless_elastic.agent.dial import Dial, Resolver
from checkpointless_elastic.agent.handshake import Handshake, Identity, NotAccepted, Role
from checkpointless_elastic.agent.runtime import EventLoop, Timer
from checkpointless_elastic.agent.sparselog import SparseLog
from checkpointless_elastic.agent.stream import Closed, Stream
from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.errors import ConfigError, ProtocolError
from checkpointless_elastic.protocol.messages import MAX_MESSAGE, Frames

__all__ = ["Closed", "Identity", "Peer", "Peers"]

logger = logging.getLogger(__name__)

MAX_WAITING = 64 << 20  # bytes that wait for a peer to read, at most (but one message may always wait)
_LENGTH = struct.Struct("<I")
_HANDSHAKE_BYTES = 1 << 16  # a TLS handshake with a chain of certificates takes a few thousand
_ACCEPTS_PER_ROUND = 16
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_PAUSE_S = 0.2


class Peer:
    """The connection to another agent. Made by Peers.

    Attributes:
        agent: the other agent's id; empty until the connection is opened.
        incoming: the other agent connected.
        address: "host:port" of the other end, as it was given or as it is seen.
        how: after its end: how it ended.
        received: bytes that came before it was opened.
    """

    def __init__(self, peers: Peers, address: str, incoming: bool) -> None:
        self.agent = ""
        self.incoming = incoming
        self.address = address
        self.how: Closed | None = None
        self._peers = peers
        self._role = Role.ACCEPTOR if incoming else Role.INITIATOR
        self._limit = time.monotonic() + peers.limit
        self._early: list[bytes] = []
        self._doomed = False
        self._frames = Frames()
        self.received = 0
        self._dial: Dial | None = None
        self._stream: Stream | None = None
        self._channel: Channel
        self._handshake: Handshake | None = None
        self._timer: Timer | None = None

    def __repr__(self) -> str:
        return f"Peer({self.agent or 'not opened'}, {self.address})"

    @property
    def is_open(self) -> bool:
        """The other agent is known and messages can be sent."""
        return bool(self.agent) and self.how is None

    @property
    def waiting(self) -> int:
        """Bytes that were sent here and have not left this process."""
        return sum(map(len, self._early)) + (self._stream.waiting if self._stream is not None else 0)

    def send(self, body: bytes) -> None:
        """Send one message. Never blocks, never raises; before `opened` it waits, after the end it is dropped.

        A peer that leaves more than MAX_WAITING bytes unread is given up.
        """
        if self.how is not None or self._doomed:
            return
        waiting = self.waiting
        if len(body) > MAX_MESSAGE:
            self._fail_soon(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
        elif waiting and waiting + len(body) > MAX_WAITING:
            self._fail_soon(f"it does not read: {waiting} bytes wait")
        elif self.agent:
            try:
                self._write(body)
            except NotAccepted as error:
                self._fail_soon(f"it cannot be sent to: {error.reason}")
        else:
            self._early.append(body)

    def close(self, reason: str) -> None:
        """Close the connection; what was sent is still delivered if the peer reads it. `closed` is not called."""
        if self.how is None:
            logger.debug("Closing the connection with %s: %s", self, reason)
            self._end(Closed.GONE)

    def detach(self) -> Wire:
        """Take the opened connection out of the loop, between two messages: `closed` is not called any more.

        Both sides must do so, each once it has heard that the other one will send nothing before. Raises ProtocolError
        if something was sent too early.
        """
        taken = self._stream.detach() if self._stream is not None and self.is_open else None
        if taken is None or self._frames.partial:
            self.close("it cannot be used for mirrors")
            raise ProtocolError("A connection for mirrors was used before both sides were ready.")
        self._end(Closed.GONE)
        return Wire(taken, self._channel)

    # ---- for Peers ------------------------------

    def dial(self, resolver: Resolver) -> None:
        """Begin to connect."""
        peers = self._peers
        self._dial = Dial(peers.loop, resolver, self.address, peers.limit, self.begin, self.fail)

    def begin(self, connection: socket.socket) -> None:
        """The TCP connection stands: prove who we are, and let the other side do so."""
        peers = self._peers
        self._dial = None
        # A connection without heartbeats of its own is lost when what was sent stays unanswered for as long.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * peers.limit))
        self._channel = peers.channels.new(self._role)
        self._handshake = Handshake(peers.identity, self._role)
        self._stream = Stream(peers.loop, connection, self._receive, self._lost)
        self._timer = peers.loop.call_later(
            self._limit - time.monotonic(),
            lambda: self.fail(Closed.TIMEOUT, f"timed out: no handshake within {peers.limit:g} s"),
        )
        self._stream.write(self._channel.pending())
        self._greet()

    def fail(self, how: Closed, reason: str) -> None:
        """The connection has ended, or is given up. Tells the owner; to be called from the loop only."""
        if self.how is None:
            self._end(how)
            self._peers.failed(self, reason)

    def abort(self) -> None:
        """Close at once and tell nobody."""
        self.how = self.how or Closed.GONE
        self._release()
        if self._stream is not None:
            self._stream.close()

    # ---- the connection ------------------------------

    def _receive(self, data: bytes) -> None:
        try:
            if self._handshake is None:
                self._dispatch(self._channel.open(data))
            else:
                self._shake(self._handshake, data)
        except NotAccepted as error:
            self._reject(error)
        except ProtocolError as error:
            self.fail(Closed.REJECTED, f"not accepted: {str(error).rstrip('.')}")

    def _shake(self, handshake: Handshake, data: bytes) -> None:
        self.received += len(data)
        plain = self._channel.open(data)
        self._tell(self._channel.pending())
        self._greet()
        if plain:
            self._tell(self._sealed(handshake.feed(plain)))
        if handshake.done:
            self._open(handshake)
        elif self.received > _HANDSHAKE_BYTES:
            raise NotAccepted(f"it sent more than {_HANDSHAKE_BYTES} bytes before the end of the handshake")

    def _greet(self) -> None:
        """Send the first message, once, as soon as the channel is ready."""
        if self._handshake is not None and self._channel.ready and not self._handshake.started:
            self._tell(self._sealed(self._handshake.start()))

    def _open(self, handshake: Handshake) -> None:
        self.agent, self._handshake = handshake.agent, None
        self._release()
        early, self._early = self._early, []
        for body in early:
            self._write(body)
        self._peers.opened(self)
        self._dispatch(handshake.rest)

    def _dispatch(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            if self.how is None:
                self._peers.take(self, body)

    def _reject(self, error: NotAccepted) -> None:
        """Tell the other side as well, as far as it understands."""
        if self.how is not None:
            return
        pending = self._channel.pending()
        self._tell(pending or (self._sealed(error.answer) if self._channel.ready else error.answer))
        self.fail(Closed.REJECTED, f"not accepted: {error.reason}")

    def _lost(self, reason: str) -> None:
        during = "" if self.agent else " during the handshake"
        self.fail(Closed.GONE, reason + during)

    def _write(self, body: bytes) -> None:
        self._tell(self._sealed(_LENGTH.pack(len(body)) + body))

    def _sealed(self, data: bytes) -> bytes:
        return self._channel.seal(data) if data else data

    def _tell(self, raw: bytes) -> None:
        if raw and self._stream is not None:
            self._stream.write(raw)

    def _fail_soon(self, reason: str) -> None:
        self._doomed = True
        self._peers.loop.call_later(0.0, lambda: self.fail(Closed.GONE, reason))

    def _end(self, how: Closed) -> None:
        self.how = how
        self._early.clear()
        self._release()
        if self._stream is not None and not self._stream.closed:
            self._peers.ending(self._stream, stranger=not self.agent)
        self._peers.forget(self)

    def _release(self) -> None:
        for thing in (self._timer, self._dial):
            if thing is not None:
                thing.cancel()
        self._timer = self._dial = None


class Peers:
    """All connections of one agent with others.

    ``opened(peer)`` comes once both sides are known, ``take(peer, body)`` for each message, ``closed(peer, reason)``
    exactly once for each peer that `connect` returned or that was opened, unless this side closed it; ``peer.how`` then
    says how it ended. All come from the loop, never from inside a method. A ProtocolError out of ``take`` closes the
    connection, with ``closed``. Not accepted connections are logged here.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self,
        loop: EventLoop,
        identity: Identity,
        bind: tuple[str, int],
        *,
        opened: Callable[[Peer], None],
        take: Callable[[Peer, bytes], None],
        closed: Callable[[Peer, str], None],
        limit: float = 5.0,
        max_handshakes: int = 64,
    ) -> None:
        """`limit`: seconds until a connection is opened. `max_handshakes`: incoming ones that are not yet opened.

        Raises ConfigError when it cannot listen or the TLS files cannot be used.
        """
        self.loop = loop
        self.identity = identity
        self.channels = Channels(identity.tls)
        self.take = take
        self._opened = opened
        self._closed = closed
        self.limit = limit
        self._log = SparseLog(loop, logger)
        self._max_handshakes = max_handshakes
        self._peers: dict[Peer, None] = {}
        self._shaking: dict[Peer, None] = {}
        self._ending: dict[Stream, None] = {}
        self._leaving: dict[Stream, None] = {}
        self._listener = _listen(bind)
        self.port: int = self._listener.getsockname()[1]
        self._resolver = Resolver(loop)
        self._resume()

    def connect(self, address: str) -> Peer:
        """Begin to connect to "host:port"; `opened` or `closed` follows. After `close` neither does."""
        peer = Peer(self, address, incoming=False)
        if self._listener.fileno() < 0:
            peer.abort()
            return peer
        self._peers[peer] = None
        peer.dial(self._resolver)
        return peer

    def close(self) -> None:
        """Close everything at once and call nobody."""
        if self._listener.fileno() < 0:
            return
        self.loop.unwatch(self._listener.fileno())
        self._listener.close()
        self._resolver.close()
        self._log.flush()
        for peer in list(self._peers):
            peer.abort()
        for stream in [*self._ending, *self._leaving]:
            stream.close()
        self._peers, self._shaking = {}, {}

    # ---- for Peer ------------------------------

    def opened(self, peer: Peer) -> None:
        """Both sides are known."""
        self._shaking.pop(peer, None)
        self._opened(peer)

    def failed(self, peer: Peer, reason: str) -> None:
        """A peer has ended, not by us."""
        if not peer.agent and peer.incoming and peer.how is Closed.GONE and not peer.received:
            logger.debug("%s connected and went away without a word.", peer.address)
        elif peer.how is Closed.REJECTED or (peer.incoming and not peer.agent):
            self._log.warning(
                "The connection %s %s is closed: %s.", "from" if peer.incoming else "to", peer.address, reason
            )
        if peer.agent or not peer.incoming:
            self._closed(peer, reason)

    def forget(self, peer: Peer) -> None:
        """A peer has ended."""
        self._peers.pop(peer, None)
        self._shaking.pop(peer, None)

    def ending(self, stream: Stream, stranger: bool) -> None:
        """A stream still sends its last bytes; of those that were never opened, `max_handshakes` may at a time."""
        ending = self._leaving if stranger else self._ending
        ending[stream] = None
        stream.finish(lambda: ending.pop(stream, None) and None)
        if len(self._leaving) > self._max_handshakes:
            next(iter(self._leaving)).close()

    # ---- listening ------------------------------

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_ROUND):
            try:
                connection, where = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if self._listener.fileno() < 0:
                    return
                if error.errno in _NO_DESCRIPTORS:
                    self._pause(error)
                    return
                continue  # that connection is gone already
            self._admit(connection, _written(where))

    def _admit(self, connection: socket.socket, address: str) -> None:
        if len(self._shaking) >= self._max_handshakes:
            oldest = next(iter(self._shaking))
            oldest.fail(Closed.TIMEOUT, f"dropped: {self._max_handshakes} newer connections are in handshake")
        peer = Peer(self, address, incoming=True)
        self._peers[peer] = self._shaking[peer] = None
        peer.begin(connection)

    def _pause(self, error: OSError) -> None:
        """The kernel would report the waiting connection again and again."""
        logger.warning("No connection can be accepted for now: %s.", os.strerror(error.errno or 0))
        self.loop.unwatch(self._listener.fileno())
        self.loop.call_later(_ACCEPT_PAUSE_S, self._resume)


def _written(where: tuple[Any, ...]) -> str:
    """A socket's address as text."""
    host, port = where[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(bind: tuple[str, int]) -> socket.socket:
    host, port = bind
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"The agent cannot listen on {host}:{port} ({error.strerror or error}); give an address of this "
            f"machine and a free port."
        ) from error
    listener.setblocking(False)
    return listener
