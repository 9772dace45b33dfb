"""A fork server of a test's own, and what its children wrote and returned."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from checkpointless_elastic.agent.forkserver import SpawnRequest
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.agent.servers import ForkServers


@dataclass(frozen=True)
class Ended:
    """What became of a child."""

    status: int
    out: str
    err: str


class Nursery:
    """Forks children and waits for them; keeps what the servers report."""

    def __init__(self, folder: Path) -> None:
        self.loop = EventLoop()
        self.run_dir = Path(tempfile.mkdtemp(prefix="nursery-"))  # sockets in it must have short names
        self.servers = ForkServers(self.loop, str(self.run_dir))
        self.servers.offspring = self
        self.pids: dict[int, int] = {}
        self.statuses: dict[int, int] = {}
        self._folder = folder
        self._numbers = itertools.count()
        self._strangers = set(psutil.Process().children())  # of tests that ran before in this process

    @property
    def processes(self) -> list[psutil.Process]:
        """The fork servers that are there."""
        return [child for child in psutil.Process().children() if child not in self._strangers]

    def spawned(self, request: int, pid: int) -> None:
        self.pids[request] = pid

    def exited(self, pid: int, status: int) -> None:
        self.statuses[pid] = status

    def start(self, mode: str, argv: list[str], env: dict[str, str] | None = None, **options: object) -> int:
        """Fork a child and return its process id."""
        number = next(self._numbers)
        out, err = self._folder / f"out.{number}", self._folder / f"err.{number}"
        given = {"stdout": str(out), "stderr": str(err), **options}
        self.servers.spawn(SpawnRequest(number, mode, argv, {**os.environ, **(env or {})}, **given))  # type: ignore[arg-type]
        assert self.loop.run(lambda: number in self.pids, 60.0)
        return self.pids[number]

    def finish(self, pid: int) -> Ended:
        """Wait for a child's end."""
        assert self.loop.run(lambda: pid in self.statuses, 60.0)
        number = next(number for number, value in self.pids.items() if value == pid)
        texts = [path.read_text() if path.exists() else "" for path in self._paths(number)]
        return Ended(self.statuses[pid], *texts)

    def run(self, mode: str, argv: list[str], env: dict[str, str] | None = None, **options: object) -> Ended:
        """Fork a child and wait for its end."""
        return self.finish(self.start(mode, argv, env, **options))

    def _paths(self, number: int) -> list[Path]:
        return [self._folder / f"{stream}.{number}" for stream in ("out", "err")]


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    """A nursery with its first server, started in `folder`."""
    present = os.getcwd()
    os.chdir(folder)
    made = Nursery(folder)
    try:
        made.servers.start()
        yield made
    finally:
        os.chdir(present)
        made.servers.close()
        made.loop.close()
        shutil.rmtree(made.run_dir, ignore_errors=True)
