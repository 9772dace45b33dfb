"""Is this node fit to run workers? Each check returns '' or the reason why not, as a sentence without its end.

Those built in take under a millisecond on a machine in order. Folders are looked at on a thread, since a file system
that is gone may never answer; the rest is done on the agent's loop. A command of the user's runs as a process of its
own, which the loop watches. None of them touches a device: a replacement does that itself (`worker.health`), so that
the agent has no context on it.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.bounded import BoundedCaller
from checkpointless_elastic.agent.credentials import without_secrets
from checkpointless_elastic.agent.runtime import EventLoop, Timer

__all__ = ["Health", "disk", "loopback", "memory"]

logger = logging.getLogger(__name__)

MIN_MEMORY = 128 << 20
"""Bytes: less, and the kernel kills what is started."""
MIN_DISK = 4 << 20
"""Bytes: room for a socket, the slots of some ranks, and a few log lines."""
LOOPBACK_TIMEOUT_S = 1.0  # on the loop: less than heartbeats may be late
ANSWER_LIMIT_S = 30.0
KILL_WAIT_S = 0.2
_TAIL = 1 << 14


def memory(least: int = MIN_MEMORY) -> str:
    """The kernel's own estimate of what can be had without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
    if free is None or free >= least:
        return ""
    return f"only {free >> 20} MiB of memory are available, under {least >> 20} MiB"


def disk(folder: str, least: int = MIN_DISK) -> str:
    """Can be written, and has room."""
    try:
        room = os.statvfs(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    free = room.f_bavail * room.f_frsize
    return "" if free >= least else f"{folder} has only {free >> 10} KiB left, under {least >> 10} KiB"


def loopback() -> str:
    """A connection of this machine to itself."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), LOOPBACK_TIMEOUT_S).close()
    except OSError as error:
        return f"this machine cannot connect to itself over TCP ({error.strerror or error})"
    return ""


class Health:
    """Checks this node before something is done. All calls belong to the loop's thread; none blocks.

    ``command``: the user's, empty for none. ``folders()``: those that workers write into, empty ones are left out.
    ``limit``: seconds in which the folders must answer, and then the command.
    """

    def __init__(
        self,
        loop: EventLoop,
        bell: Bell,
        command: str,
        folders: Callable[[], list[str]],
        limit: float = ANSWER_LIMIT_S,
    ) -> None:
        self._loop, self._bell, self._text, self._folders, self._limit = loop, bell, command, folders, limit
        self._files = BoundedCaller("checkpointless-health")
        self._waiting: list[Callable[[str], None]] = []
        self._looking: Timer | None = None
        self._command: _Command | None = None

    def check(self, found: Callable[[str], None]) -> None:
        """Call ``found(reason)``, '' if this node is well: now, or once folders and the user's command have answered.

        Who asks while an answer is waited for gets that one.
        """
        self._waiting.append(found)
        if len(self._waiting) == 1:
            self._begin()

    def _begin(self) -> None:
        reason = memory() or loopback()
        if reason:
            self._ended(reason)
            return
        folders = [folder for folder in self._folders() if folder]
        late = f"nothing can be written in {' and '.join(folders)} within {self._limit:.0f} s"
        timer = self._looking = self._loop.call_later(self._limit, lambda: self._ended(late))
        answer = self._files.submit(lambda: next(filter(None, map(disk, folders)), ""))
        answer.add_done_callback(lambda done: self._bell.ring(functools.partial(self._looked, timer, done)))

    def _looked(self, timer: Timer, answer: Future[str]) -> None:
        """The folders have answered."""
        if not timer.active:
            return
        timer.cancel()
        reason = answer.result()
        if reason or not self._text:
            self._ended(reason)
            return
        try:
            self._command = _Command(self._loop, self._text, self._limit, self._ended)
        except OSError as error:
            self._ended(f"the health check {self._text!r} cannot be started ({error.strerror})")

    def close(self) -> None:
        """Nobody is answered any more; a command that runs is killed."""
        self._waiting = []
        self._files.close()
        if self._looking is not None:
            self._looking.cancel()
        if self._command is not None:
            self._command.kill()

    def _ended(self, reason: str) -> None:
        waiting, self._waiting, self._command = self._waiting, [], None
        for found in waiting:
            found(reason)


class _Command:
    """One run of the user's command. ``ended(reason)`` is called once, on the loop. Raises OSError if none starts."""

    def __init__(self, loop: EventLoop, text: str, limit: float, ended: Callable[[str], None]) -> None:
        self._loop, self._text, self._limit, self._tell = loop, text, limit, ended
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", text],
            env=without_secrets(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._said = b""
        self._pidfd = os.pidfd_open(self._process.pid)
        self._timer: Timer = loop.call_later(limit, self._late)
        loop.watch(self._pipe, self._read)
        loop.watch(self._pidfd, self._exited)

    def kill(self) -> None:
        """End it with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._close()

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while data := os.read(self._pipe, _TAIL):
                self._said = (self._said + data)[-_TAIL:]
            self._loop.unwatch(self._pipe)

    def _late(self) -> None:
        self.kill()
        self._tell(f"the health check {self._text!r} gave no answer within {self._limit:.0f} s")

    def _exited(self) -> None:
        self._read()  # what it said last
        self.kill()
        code = self._process.returncode
        lines = self._said.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"exited with code {code}")
        self._tell(f"the health check {self._text!r} says: {last}" if code else "")

    def _close(self) -> None:
        self._timer.cancel()
        for fd in (self._pipe, self._pidfd):
            self._loop.unwatch(fd)
        os.close(self._pidfd)
        assert self._process.stdout is not None
        self._process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel is left behind
            self._process.wait(KILL_WAIT_S)
