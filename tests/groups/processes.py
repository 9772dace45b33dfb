"""Real worker processes for the tests of process groups: started from one warm server, killed for real, replaced."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import FileStore

from checkpointless_elastic.groups import LoggedCollective, Registry, Situation

LIMIT = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.fsdp", "checkpointless_elastic.groups"]
)


@dataclass
class MemoryHost:
    """A small working session: it knows its situation, keeps the log, and waits for a freeze like the real one."""

    where: Situation = Situation.ATTEMPT
    recover: Callable[[], None] | None = None
    log: list[LoggedCollective] = field(default_factory=list)
    old_log: list[LoggedCollective] = field(default_factory=list)
    nan_outputs: int = 0
    waits_for_freeze: Callable[[], bool] = lambda: False
    recoveries: int = 0

    def situation(self) -> Situation:
        return self.where

    def is_frozen(self) -> bool:
        return self.waits_for_freeze()

    def wait_for_loss(self, explains: Callable[[], bool]) -> bool:
        return self.waits_for_freeze() and explains()

    def recover_outside(self) -> None:
        assert self.recover is not None, "this test did not expect a recovery"
        self.recoveries += 1
        self.recover()

    def record(self, entry: LoggedCollective) -> None:
        self.log.append(entry)

    def replay(self, group: str, op: str) -> LoggedCollective | None:
        for index, entry in enumerate(self.old_log):
            if entry.group == group:
                return self.old_log.pop(index)
        return None

    def void_after_commit(self, outputs: list[torch.Tensor]) -> None:
        self.nan_outputs += len(outputs)


@dataclass
class Worker:
    """What the body of a worker is given: its rank, a store, its host and its registry."""

    rank: int
    size: int
    path: str
    pipe: Connection
    host: MemoryHost
    registry: Registry

    @functools.cached_property
    def store(self) -> FileStore:
        """The test's store. A file: every new client of a TCPStore looks up its peer's name, which can take seconds."""
        store = FileStore(self.path, -1)
        store.set_timeout(timedelta(seconds=LIMIT))
        return store

    def meet(self, place: str) -> None:
        """Waits in the store until every rank is here."""
        self.store.set(f"{place}/{self.rank}", "here")
        self.store.wait([f"{place}/{rank}" for rank in range(self.size)])

    def say(self, word: str) -> None:
        """Tells the test something."""
        self.pipe.send(("said", word))

    def hear(self) -> Any:
        """Waits for the test's next word."""
        assert self.pipe.poll(LIMIT), f"rank {self.rank} heard nothing from the test"
        return self.pipe.recv()


def _run(
    body: Callable[[Worker], Any], rank: int, size: int, path: str, pipe: Connection, shadow: bool
) -> None:
    import torch

    torch.set_num_threads(1)
    host = MemoryHost()
    worker = Worker(rank, size, path, pipe, host, Registry(host, shadow=shadow))
    try:
        pipe.send(("done", body(worker)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


class Job:
    """Some workers that run one body, under a store of the test's own."""

    def __init__(self, body: Callable[[Worker], Any], size: int = 3) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._path = f"{self._folder.name}/store"
        self.processes: dict[int, BaseProcess] = {}
        self.pipes: dict[int, Connection] = {}
        for rank in range(size):
            self.start(rank, body)

    def start(self, rank: int, body: Callable[[Worker], Any], *, shadow: bool = False) -> None:
        """Starts a worker, or the replacement of a killed one."""
        here, there = _context.Pipe()
        arguments = (body, rank, self.size, self._path, there, shadow)
        process = _context.Process(target=_run, args=arguments, daemon=True)
        process.start()
        there.close()
        self.processes[rank], self.pipes[rank] = process, here

    def kill(self, rank: int) -> None:
        """SIGKILL, and waits for the end."""
        process = self.processes[rank]
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(LIMIT)

    def heard(self, rank: int) -> Any:
        """The next thing that a worker says."""
        kind, value = self._next(rank)
        assert kind == "said", f"rank {rank} {kind}: {value}"
        return value

    def tell(self, word: Any, *ranks: int) -> None:
        """Gives the workers a word that `Worker.hear` returns."""
        for rank in ranks or self.processes:
            self.pipes[rank].send(word)

    def result(self, rank: int) -> Any:
        """What the body returned."""
        kind, value = self._next(rank)
        assert kind == "done", f"rank {rank} {kind}:\n{value}"
        self.processes[rank].join(LIMIT)
        return value

    def results(self, *ranks: int) -> list[Any]:
        """What the bodies returned, by rank."""
        return [self.result(rank) for rank in ranks or range(self.size)]

    def _next(self, rank: int) -> tuple[str, Any]:
        assert self.pipes[rank].poll(LIMIT), f"rank {rank} said nothing for {LIMIT} s"
        message: tuple[str, Any] = self.pipes[rank].recv()
        return message

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join(LIMIT)
        self._folder.cleanup()
