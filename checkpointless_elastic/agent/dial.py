"""Connecting to "host:port" without blocking the loop: names are resolved on threads, addresses tried in turn."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from checkpointless_elastic.agent.runtime import EventLoop, Timer
from checkpointless_elastic.agent.stream import Closed

__all__ = ["Dial", "Resolver", "split_address"]

Target = tuple[socket.AddressFamily, Any]  # the second: what `socket.connect` takes
Found = Callable[[list[Target], str], None]

_REFUSED = (errno.ECONNREFUSED, errno.ECONNRESET)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port". Raises ValueError."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not of the form host:port.")
    return host, int(port)


def _numeric(host: str, port: int) -> list[Target]:
    """The target, if the host is an address; nothing if it is a name."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return []
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]


class Resolver:
    """Looks names up, each on a thread of its own: a lookup can take many seconds when a name server is away.

    The threads are daemons and end by themselves; a result that nobody waits for any more is dropped.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._results: deque[tuple[Found, list[Target], str]] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        loop.watch(self._reader.fileno(), self._deliver)

    def look_up(self, host: str, port: int, found: Found) -> None:
        """Call `found(targets, "")` or `found([], why)` on the loop, if the resolver is not closed before."""
        thread = threading.Thread(target=self._work, args=(host, port, found), name="resolve", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            self._results.append((found, [], str(error)))
            self._wake()

    def close(self) -> None:
        """Deliver nothing any more."""
        self._loop.unwatch(self._reader.fileno())
        self._reader.close()
        self._writer.close()

    def _work(self, host: str, port: int, found: Found) -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self._results.append((found, [(row[0], row[4]) for row in rows], ""))
        except (OSError, UnicodeError) as error:
            self._results.append((found, [], str(error)))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # closed, or full of wake-ups already
            self._writer.send(b"x")

    def _deliver(self) -> None:
        self._reader.recv(4096)
        while self._results:
            found, targets, why = self._results.popleft()
            found(targets, why)


class Dial:
    """One attempt to connect within `limit` seconds. Ends, on the loop, in one call of `connected` or `failed`."""

    def __init__(
        self,
        loop: EventLoop,
        resolver: Resolver,
        address: str,
        limit: float,
        connected: Callable[[socket.socket], None],
        failed: Callable[[Closed, str], None],
    ) -> None:
        self._loop = loop
        self._limit = limit
        self._connected = connected
        self._failed = failed
        self._socket: socket.socket | None = None
        self._left: list[Target] = []
        self._share = limit
        self._over = False
        self._timer = loop.call_later(limit, self._expire)
        self._turn: Timer | None = None
        self._begin(resolver, address)

    def cancel(self) -> None:
        """Give up; nothing is called any more."""
        self._over = True
        self._timer.cancel()
        self._drop()

    def _begin(self, resolver: Resolver, address: str) -> None:
        try:
            host, port = split_address(address)
        except ValueError as error:
            why = str(error)
            self._loop.call_later(0.0, lambda: self._fail(Closed.TIMEOUT, why))
            return
        targets = _numeric(host, port)
        if targets:
            self._loop.call_later(0.0, lambda: self._found(targets, ""))
        else:
            resolver.look_up(host, port, self._found)

    def _found(self, targets: list[Target], why: str) -> None:
        if self._over:
            return
        if not targets:
            self._fail(Closed.TIMEOUT, f"the name cannot be resolved ({why})")
            return
        self._left = list(targets)
        self._share = self._limit / len(targets)
        self._next()

    def _next(self) -> None:
        """Try the next address; the last one may take all the time that is left."""
        family, target = self._left.pop(0)
        self._turn = self._loop.call_later(self._share, self._skip) if self._left else None
        try:
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            code = self._socket.connect_ex(target)
        except OSError as error:  # no descriptor left, no IPv6 here, no such interface
            code = error.errno if error.errno and error.errno > 0 else errno.EADDRNOTAVAIL
        if self._socket is not None and code == errno.EINPROGRESS:
            self._loop.watch(self._socket.fileno(), self._check, self._check)
        else:
            self._result(code)

    def _check(self) -> None:
        assert self._socket is not None
        self._result(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _result(self, code: int) -> None:
        connection = self._socket
        if connection is not None and code == 0 and _to_itself(connection):
            code = errno.ECONNREFUSED
        if connection is not None and code == 0:
            self._socket = None
            self._loop.unwatch(connection.fileno())
            self.cancel()
            self._connected(connection)
        elif self._left:
            self._skip()
        else:
            how = Closed.REFUSED if code in _REFUSED else Closed.TIMEOUT
            self._fail(how, f"{'refused' if how is Closed.REFUSED else 'no way to it'} ({os.strerror(code)})")

    def _skip(self) -> None:
        self._drop()
        self._next()

    def _expire(self) -> None:
        self._fail(Closed.TIMEOUT, f"timed out: no connection within {self._limit:g} s")

    def _fail(self, how: Closed, reason: str) -> None:
        if not self._over:
            self.cancel()
            self._failed(how, reason)

    def _drop(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None


def _to_itself(connection: socket.socket) -> bool:
    """Linux connects a socket to itself when its own port, chosen at random, is the one that nobody listens on."""
    try:
        return bool(connection.getsockname() == connection.getpeername())
    except OSError:  # reset already; reading will tell
        return False
