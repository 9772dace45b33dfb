"""A TCP connection on the event loop: bytes in, bytes out. Nothing here blocks."""

from __future__ import annotations

import enum
import os
import socket
from collections.abc import Callable

from checkpointless_elastic.agent.runtime import EventLoop, Timer

__all__ = ["LINGER_S", "Closed", "Stream"]

LINGER_S = 1.0  # limit for the last bytes of a connection that this side closes
_CHUNK = 1 << 18  # bytes to send in one call
_RECEIVE = 1 << 16  # and to receive: a buffer that malloc does not map anew each time
_CHUNKS_PER_ROUND = 16  # so that one fast reader does not keep the loop from the others


class Closed(enum.Enum):
    """How a connection ended, as far as this side can know."""

    REFUSED = "refused"  # the host answered that nobody listens there: that process is gone
    GONE = "gone"  # the connection was there, and was closed or reset
    TIMEOUT = "timeout"  # no answer, or no way to the host: nothing is known of the process
    REJECTED = "rejected"  # one side did not accept the other, or what it sent


class Stream:
    """One connected socket.

    ``receive(data)`` gets what arrives; ``lost(reason)`` is called once when the connection has ended by itself, after
    everything that had arrived was handed over. Both come from the loop, never from inside a method.
    """

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        receive: Callable[[bytes], None],
        lost: Callable[[str], None],
    ) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop = loop
        self._socket = connection
        self._receive = receive
        self._lost = lost
        self._out = bytearray()
        self._writing = False
        self._broken = ""
        self._linger: Timer | None = None
        self._done: Callable[[], None] = _nothing
        loop.watch(connection.fileno(), self._read)

    @property
    def closed(self) -> bool:
        """Whether the socket is closed."""
        return self._socket.fileno() < 0

    @property
    def waiting(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return len(self._out)

    def write(self, data: bytes) -> None:
        """Send as soon as possible. A connection that cannot send any more is reported by `lost`."""
        if self.closed or self._broken or self._linger is not None:
            return
        self._out += data
        if not self._writing:
            self._flush()

    def finish(self, done: Callable[[], None]) -> None:
        """Send what is left, then close, within LINGER_S. Nothing is reported from now on but `done`, at the end.

        The other side's bytes are read and dropped meanwhile: a socket that is closed with unread bytes sends a reset,
        which may destroy our own last bytes before they are read.
        """
        if self.closed or self._linger is not None:
            return
        self._done = done
        self._linger = self._loop.call_later(LINGER_S, self.close)
        if not self._out:
            self._shut()

    def close(self) -> None:
        """Close at once. Nothing is reported from now on."""
        if self._linger is not None:
            self._linger.cancel()
        if not self.closed:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._done()
        self._out.clear()

    def detach(self) -> socket.socket | None:
        """The socket, which the loop has nothing to do with any more; None if it is closed or bytes wait."""
        if self.closed or self._broken or self._linger is not None or self._out:
            return None
        self._loop.unwatch(self._socket.fileno())
        taken, self._socket = self._socket, socket.socket()
        self._socket.close()
        return taken

    def _flush(self) -> None:
        try:
            for _ in range(_CHUNKS_PER_ROUND):
                if not self._out:
                    break
                self._send_chunk()
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(f"connection lost ({os.strerror(error.errno or 0)})")
        self._want_write(bool(self._out))
        if self._linger is not None and not self._out:
            self._shut()

    def _send_chunk(self) -> None:
        with memoryview(self._out) as view, view[:_CHUNK] as part:
            sent = self._socket.send(part)
        del self._out[:sent]

    def _want_write(self, wanted: bool) -> None:
        if wanted != self._writing and not self.closed:
            self._writing = wanted
            self._loop.watch(self._socket.fileno(), self._read, self._flush if wanted else None)

    def _break(self, reason: str) -> None:
        """Nothing more can be sent. What has arrived is still read; that, or the end of it, comes from the loop."""
        self._broken = reason
        self._out.clear()
        self._loop.call_later(0.0, self._read)

    def _shut(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def _read(self) -> None:
        if self.closed:
            return
        try:
            data = self._socket.recv(_RECEIVE)
        except BlockingIOError:
            if self._broken:
                self._end(self._broken)
            return
        except OSError as error:
            self._end(f"connection lost ({os.strerror(error.errno or 0)})")
            return
        if not data:
            self._end(self._broken or "closed by the peer")
            return
        if self._broken:
            self._loop.call_later(0.0, self._read)
        if self._linger is None:
            self._receive(data)

    def _end(self, reason: str) -> None:
        finishing = self._linger is not None
        self.close()
        if not finishing:
            self._lost(reason)


def _nothing() -> None:
    """Nobody waits for the end of a connection that ends by itself."""
