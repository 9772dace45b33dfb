"""The agent's ends of its workers' connections: accepted, checked, read and written without blocking the loop.

What a worker does not read at once waits here, whole and in order. That it does not read for long is for hang detection
to judge; a worker is ended here only when too much waits for it.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.messages import (
    VERSION,
    Frames,
    FromWorker,
    Hello,
    Message,
    Refused,
    decode_from_worker,
    encode,
)

logger = logging.getLogger(__name__)

MAX_WAITING = 64 << 20
"""Bytes that wait for a worker to read, at most (but one message may always wait)."""


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """(process id, user id) of the other end of a unix socket, as the kernel knows them."""
    size = struct.calcsize("3i")
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


@dataclass
class Link:
    """One connection of a worker. ``rank`` is -1 until its Hello was accepted."""

    socket: socket.socket
    frames: Frames = field(default_factory=Frames)
    rank: int = -1
    channel: str = ""
    out: bytearray = field(default_factory=bytearray)
    writing: bool = False
    choked: bool = False

    def flush(self) -> None:
        """Send as much of what waits as the kernel takes now. Raises OSError when the worker is gone."""
        with memoryview(self.out) as view:
            try:
                sent = self.socket.send(view)
            except BlockingIOError:
                sent = 0
        del self.out[:sent]


class Links:
    """All connections of this node's workers.

    ``accept(hello)`` returns the answer to send, a Refused among them, or None for a worker that the fork server has
    not reported yet: it is asked again at `retry`. ``take(rank, message)`` gets each message of an accepted worker.
    ``choked(rank, reason)``: too much waits for this worker, once per connection; the reason completes "rank 3 ...".
    All run on the loop's thread.
    """

    def __init__(
        self,
        path: str,
        loop: EventLoop,
        accept: Callable[[Hello], Message | None],
        take: Callable[[int, FromWorker], None],
        choked: Callable[[int, str], None],
    ) -> None:
        self._loop = loop
        self._accept_hello = accept
        self._take = take
        self._choked = choked
        self._links: dict[tuple[int, str], Link] = {}
        self._early: list[tuple[Link, Hello]] = []
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(128)
        self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        pid, uid = peer_credentials(connection)
        if uid != os.getuid():
            logger.warning(
                "Refused a connection of process %d of user %d: only user %d may.", pid, uid, os.getuid()
            )
            connection.close()
            return
        connection.setblocking(False)
        link = Link(connection)
        self._loop.watch(connection.fileno(), functools.partial(self._read, link))

    def _read(self, link: Link) -> None:
        try:
            data = link.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(link)
            return
        try:
            for body in link.frames.feed(data):
                self._dispatch(link, decode_from_worker(body))
        except ProtocolError as error:
            logger.warning("Dropped a connection of rank %d: %s", link.rank, error)
            self._drop(link)

    def _dispatch(self, link: Link, message: FromWorker) -> None:
        if link.rank >= 0:
            self._take(link.rank, message)
            return
        if not isinstance(message, Hello):
            raise ProtocolError(f"{type(message).__name__} came before Hello.")
        self._greet(link, message)

    def _greet(self, link: Link, hello: Hello) -> None:
        answer: Message | None = Refused(f"the worker speaks version {hello.version}, the agent {VERSION}.")
        if hello.version == VERSION:
            answer = self._accept_hello(hello)
        if answer is None:
            self._early.append((link, hello))
            return
        self._write(link, encode(answer))
        if isinstance(answer, Refused):
            raise ProtocolError(answer.reason)
        link.rank, link.channel = hello.rank, hello.channel
        self._links[link.rank, link.channel] = link

    def retry(self) -> None:
        """Ask again for workers that greeted before the fork server reported them."""
        early, self._early = self._early, []
        for link, hello in early:
            if link.socket.fileno() < 0:
                continue
            try:
                self._greet(link, hello)
            except (ProtocolError, OSError) as error:
                logger.warning("Dropped a connection of rank %d: %s", hello.rank, error)
                self._drop(link)

    def send(self, rank: int, channel: str, data: bytes) -> bool:
        """Send encoded bytes to a rank, now or as soon as it reads. Never blocks.

        False: it is not connected, or is going away, or too much waits for it already.
        """
        link = self._links.get((rank, channel))
        if link is None or link.choked:
            return False
        if link.out and len(link.out) + len(data) > MAX_WAITING:
            link.choked = True
            reason = f"did not read what its agent sent: {len(link.out)} bytes wait"
            self._loop.call_later(0.0, lambda: self._choked(link.rank, reason))
            return False
        try:
            self._write(link, data)
        except OSError as error:
            logger.warning("rank %d does not take messages (%s)", rank, error)
            return False
        return True

    def _write(self, link: Link, data: bytes) -> None:
        waited = bool(link.out)
        link.out += data
        if not waited:
            self._flush(link)

    def _flush(self, link: Link) -> None:
        try:
            link.flush()
        except OSError:
            link.out.clear()  # the worker is gone: that, and what it still sent, is read
            raise
        finally:
            if bool(link.out) != link.writing:  # a system call that most messages are spared
                link.writing = bool(link.out)
                more = (lambda: self._write_on(link)) if link.writing else None
                self._loop.watch(link.socket.fileno(), lambda: self._read(link), more)

    def _write_on(self, link: Link) -> None:
        try:
            self._flush(link)
        except OSError as error:
            logger.warning("rank %d does not take messages any more (%s)", link.rank, error)

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """Ranks of this node have other numbers from now on; by the old ones, the new ones."""
        for link in self._links.values():
            link.rank = numbers[link.rank]
        self._links = {(link.rank, link.channel): link for link in self._links.values()}

    def drain(self, rank: int) -> None:
        """Take what a worker that is gone still sent, then forget its connections."""
        for channel in ("control", "vote"):
            link = self._links.get((rank, channel))
            if link is not None:
                self._read(link)
                if self._links.get((rank, channel)) is link:
                    self._drop(link)

    def _drop(self, link: Link) -> None:
        if link.socket.fileno() >= 0:
            self._loop.unwatch(link.socket.fileno())
            link.socket.close()
        if self._links.get((link.rank, link.channel)) is link:
            del self._links[link.rank, link.channel]

    def close(self) -> None:
        """Close the listener and all connections, and remove the socket file."""
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        for link in [*self._links.values(), *(link for link, _ in self._early)]:
            self._drop(link)
        if os.path.exists(self._path):
            os.unlink(self._path)
