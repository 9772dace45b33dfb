"""The agent's side of the fork servers: starts them, hands them requests, passes on what they report.

There is one current server. A successor with more modules loaded is started in the background and takes over when it is
ready; the old one stays, as the parent of its workers, until the last of them has ended.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Protocol

import msgspec

from checkpointless_elastic.agent import preload
from checkpointless_elastic.agent.credentials import without_secrets
from checkpointless_elastic.agent.forkserver import (
    Dropped,
    Exited,
    FromServer,
    Loading,
    Ready,
    Retire,
    Spawned,
    SpawnRequest,
    command,
    frame,
    kill_group,
)
from checkpointless_elastic.agent.runtime import EventLoop, Timer
from checkpointless_elastic.protocol.messages import Frames

__all__ = ["ForkServers", "Offspring"]

logger = logging.getLogger(__name__)
_END_TIMEOUT_S = 2.0
"""For a server to end by itself, and once more after SIGKILL: if it does not then, it hangs in the kernel."""
_messages: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


class Offspring(Protocol):
    """Who wants to know about forked processes; called on the loop's thread."""

    def spawned(self, request: int, pid: int) -> None:
        """The request's child exists."""

    def exited(self, pid: int, status: int) -> None:
        """A child has ended: exit code, or negative signal."""


class _Server:
    """One server process as the agent sees it."""

    def __init__(self, modules: list[str], run_dir: str) -> None:
        self.modules = modules
        self.ready = False
        self.loading = ""
        self.pending: dict[int, SpawnRequest] = {}
        self.children: set[int] = set()
        self.frames = Frames()
        self.connection, theirs = socket.socketpair()
        quiet = {"OPENBLAS_NUM_THREADS": "1"}  # its threads would make forking unsafe
        env = {**quiet, **without_secrets(os.environ)}
        with theirs:
            self.process = subprocess.Popen(
                command(theirs.fileno(), run_dir, modules),
                env=env,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def send(self, request: SpawnRequest) -> None:
        """A server that is gone is noticed when its socket is read; what is pending is then sent to another one."""
        self.pending[request.id] = request
        try:
            self.connection.sendall(frame(request))
        except OSError:
            logger.debug("Request %s waits for another fork server.", request.id)

    def retire(self) -> None:
        """Let a server end that has no children."""
        try:
            self.connection.sendall(frame(Retire()))
        except ConnectionError:
            logger.debug("The fork server %s has ended before it was told to.", self.process.pid)

    def end(self) -> None:
        """Close the connection, which ends the process and all that it has forked. Blocks until it has ended."""
        self.connection.close()
        for _ in range(2):
            try:
                self.process.wait(_END_TIMEOUT_S)
                break
            except subprocess.TimeoutExpired:  # it is importing something that takes long
                self.process.kill()
        self.status()

    def status(self) -> int:
        """With which it has ended.

        If it was killed, the kernel has killed its workers, but not what these have started (loader processes).
        """
        status = self.process.poll()
        for pid in self.children if status != 0 else ():
            kill_group(pid)
        return -signal.SIGKILL if status is None else status


class _Ending:
    """What `_Server.end` does, beside everything else; ``then(status)`` follows."""

    def __init__(self, loop: EventLoop, server: _Server, then: Callable[[int], None]) -> None:
        self._loop, self._server, self._then = loop, server, then
        server.connection.close()
        self._pidfd = os.pidfd_open(server.process.pid)
        self._timer: Timer = loop.call_later(_END_TIMEOUT_S, self._kill)
        loop.watch(self._pidfd, self._ended, first=True)

    def _kill(self) -> None:
        self._server.process.kill()
        self._timer = self._loop.call_later(_END_TIMEOUT_S, self._ended)

    def _ended(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._then(self._server.status())


class ForkServers:
    """All fork servers of one agent. `offspring` may be exchanged while no child lives.

    Nothing blocks but `close`, and `start` for the time of a fork.
    """

    def __init__(self, loop: EventLoop, run_dir: str) -> None:
        self.offspring: Offspring | None = None
        self.dropped: dict[str, str] = {}
        self._loop = loop
        self._run_dir = run_dir
        self._servers: list[_Server] = []
        self._ending: set[_Server] = set()
        self._current: _Server | None = None
        self._successor: _Server | None = None
        self._await_ready: list[Callable[[], None]] = []

    def start(self) -> None:
        """Start the first server."""
        self._current = self._launch(list(preload.BASE))

    @property
    def loaded(self) -> list[str]:
        """Modules of the current server; empty until it is ready."""
        return list(self._current.modules) if self._current is not None and self._current.ready else []

    def when_ready(self, then: Callable[[], None]) -> None:
        """Call it once a worker could be forked at once: now, or in a while."""
        if self.loaded:
            then()
        else:
            self._await_ready.append(then)

    def learn(self, modules: list[str]) -> None:
        """Start a successor that has these modules too; no-op if one is on its way or the current one has them."""
        wanted = [name for name in preload.learned(modules) if name not in self.dropped]
        if self._current is None or self._successor is not None or set(wanted) <= set(self._current.modules):
            return
        self._successor = self._launch(wanted)

    def spawn(self, request: SpawnRequest) -> None:
        """Fork a worker; `offspring.spawned` follows. Requests wait while the first server is loading."""
        assert self._current is not None, "start() comes first"
        self._current.send(request)

    def close(self) -> None:
        """End all servers and whatever they have forked."""
        for server in self._servers:
            self._loop.unwatch(server.connection.fileno())
        for server in (*self._servers, *self._ending):
            server.end()
        self._servers, self._current, self._successor = [], None, None

    def _launch(self, modules: list[str]) -> _Server:
        server = _Server(modules, self._run_dir)
        self._servers.append(server)
        self._loop.watch(server.connection.fileno(), lambda: self._read(server), first=True)
        return server

    def _read(self, server: _Server) -> None:
        try:
            data = server.connection.recv(1 << 16)
        except ConnectionError:
            data = b""
        for body in server.frames.feed(data):
            self._take(server, _messages.decode(body))
        if not data:
            self._forget(server, functools.partial(self._gone, server))

    def _take(self, server: _Server, message: FromServer) -> None:
        if isinstance(message, Loading):
            server.loading = message.module
        elif isinstance(message, Dropped):
            self._drop(message.module, message.reason)
        elif isinstance(message, Ready):
            server.ready, server.loading = True, ""
            self._swap(server)
            waiting, self._await_ready = self._await_ready, []
            for then in waiting:
                then()
        elif isinstance(message, Spawned):
            del server.pending[message.id]
            server.children.add(message.pid)
            if self.offspring is not None:
                self.offspring.spawned(message.id, message.pid)
        else:
            self._child_ended(server, message)

    def _child_ended(self, server: _Server, message: Exited) -> None:
        server.children.discard(message.pid)
        if self.offspring is not None:
            self.offspring.exited(message.pid, message.status)
        self._retire()

    def _drop(self, module: str, reason: str) -> None:
        if module not in self.dropped:
            self.dropped[module] = reason
            logger.info("The module %s is not loaded before forking: %s.", module, reason)

    def _swap(self, server: _Server) -> None:
        if server is self._successor:
            logger.info("A fork server with %s modules loaded takes over.", len(server.modules))
            self._current, self._successor = server, None
            self._retire()

    def _retire(self) -> None:
        """End servers that are neither needed for new workers nor parents of living ones."""
        for server in list(self._servers):
            if server in (self._current, self._successor) or server.children or server.pending:
                continue
            server.retire()
            self._forget(server, lambda status: None)

    def _forget(self, server: _Server, then: Callable[[int], None]) -> None:
        """``then(status)`` is called once it has ended."""
        self._loop.unwatch(server.connection.fileno())
        self._servers.remove(server)
        self._ending.add(server)
        _Ending(self._loop, server, functools.partial(self._ended, server, then))

    def _ended(self, server: _Server, then: Callable[[int], None], status: int) -> None:
        self._ending.discard(server)
        then(status)

    def _gone(self, server: _Server, status: int) -> None:
        """A server has ended by itself: it dropped a module, or it died (and the kernel killed its workers)."""
        if server.loading:
            self._drop(server.loading, f"the fork server ended with status {status} while it was loading it")
        elif not server.ready:
            raise RuntimeError(
                f"The fork server ended with status {status} before it loaded anything; see its output."
            )
        else:
            logger.error(
                "The fork server %s ended with status %s; its workers end too.", server.process.pid, status
            )
        modules = [name for name in server.modules if name not in self.dropped]
        if server is self._successor:
            self._successor = self._launch(modules)
        elif server is self._current:
            self._current = self._launch(modules)
        for request in server.pending.values():
            self.spawn(request)
        for pid in sorted(server.children):
            if self.offspring is not None:
                self.offspring.exited(pid, -signal.SIGKILL)
