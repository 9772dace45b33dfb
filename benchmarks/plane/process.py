"""A process with many agents, and how it is told what to do: a pipe to the benchmark, served by the agents' loop."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from checkpointless_elastic.agent.directory_tcp import TcpDirectory
from checkpointless_elastic.agent.membership import Network
from checkpointless_elastic.agent.peers import Identity
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.protocol.rules import Rules
from plane.agent import Agent

__all__ = ["LIMIT_S", "Child", "Settings", "agents_process", "raise_limits"]

LIMIT_S = 120.0
"""For everything that is waited for."""
JOB = "control-plane"
PRELOADED = [
    "checkpointless_elastic.agent.membership",
    "checkpointless_elastic.agent.directory_tcp",
]  # and torch
TOKEN = b"agents on one machine, for a moment"


@dataclass(frozen=True)
class Settings:
    """Of one job.

    Attributes:
        agents: of the whole job.
        ranks: of each agent.
        port: of the store.
        heartbeat: seconds; long, so that heartbeats do not disturb what is measured.
    """

    agents: int
    ranks: int
    port: int
    heartbeat: float

    def rules(self) -> Rules:
        return Rules(
            active_nodes=self.agents,
            max_nodes=self.agents + 1,  # one alone would have no network
            max_faults_per_step=1000,
            heartbeat=self.heartbeat,
            heartbeat_misses=6,
        )


def raise_limits() -> None:
    """As many descriptors as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Child:
    """A process that was started, and the pipe to it."""

    def __init__(self, body: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process: ForkServerProcess = context.Process(
            target=body, args=(*arguments, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def tell(self, order: str, argument: object = None) -> None:
        self._pipe.send((order, argument))

    def answer(self, seconds: float = LIMIT_S) -> Any:
        """The next thing that it says. Raises RuntimeError when it has ended, or says nothing in time."""
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except EOFError:
            raise RuntimeError("A process with agents has ended; what it wrote is above.") from None
        raise RuntimeError(f"A process with agents has said nothing for {seconds:g} s.")

    def ask(self, order: str, argument: object = None) -> Any:
        self.tell(order, argument)
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def agents_process(number: int, count: int, settings: Settings, pipe: Connection) -> None:
    """Body of a process with ``count`` agents; ends when it is killed."""
    raise_limits()
    _Process(number, settings, pipe).run(count)


class _Process:
    def __init__(self, number: int, settings: Settings, pipe: Connection) -> None:
        self._number, self._settings, self._pipe = number, settings, pipe
        self._loop = EventLoop()
        self._directory = TcpDirectory.open(
            "127.0.0.1", settings.port, JOB, 30.0, timeout=LIMIT_S, is_host=False
        )
        self._agents: list[Agent] = []
        self._busy = 0.0  # this process's processor time when messages were counted last
        self._began = 0.0  # when the first agent of this process was ready
        self._awaited: Callable[[Agent], float] | None = None

    def run(self, count: int) -> None:
        for _ in range(count):  # one after the other, as a listener takes only so many handshakes at a time
            self._agents.append(self._start())
            if not self._loop.run(lambda: self._agents[-1].greeted, LIMIT_S):
                raise RuntimeError("The coordinator did not answer.")
        self._pipe.send("greeted")
        self._loop.watch(self._pipe.fileno(), self._take)
        self._loop.run(lambda: False)

    def _start(self) -> Agent:
        identity = Identity(JOB, f"agent-{self._number}-{len(self._agents)}", TOKEN)
        network = Network(identity, "127.0.0.1", lambda: self._directory)
        return Agent(self._loop, self._settings.rules(), network, self._settings.ranks, self._changed)

    def _take(self) -> None:
        order, argument = self._pipe.recv()
        getattr(self, f"_do_{order}")(argument)

    def _changed(self) -> None:
        """Tell the benchmark once all agents of this process have come to what it waits for."""
        if self._awaited is not None and all(map(self._awaited, self._agents)):
            last = max(map(self._awaited, self._agents))
            self._awaited = None
            self._pipe.send((self._began, last, self._agents[0].reached))

    # ---- orders

    def _do_seated(self, argument: object) -> None:
        self._awaited = lambda agent: agent.seated
        self._changed()

    def _do_ready(self, argument: object) -> None:
        for agent in self._agents:
            agent.clear()
        self._awaited, self._began = lambda agent: agent.committed, time.monotonic()
        for agent in self._agents:
            agent.ready()

    def _do_resumed(self, argument: object) -> None:
        """A recovery follows."""
        for agent in self._agents:
            agent.clear()
        self._awaited = lambda agent: agent.resumed
        self._pipe.send("waits")

    def _do_lose(self, which: int) -> None:
        self._began = self._agents[which % len(self._agents)].lose()

    def _do_count(self, argument: object) -> None:
        counts = [agent.membership.messages for agent in self._agents]
        for agent in self._agents:
            agent.membership.messages = 0
        before, self._busy = self._busy, time.process_time()
        self._pipe.send((counts, 1e3 * (self._busy - before)))
