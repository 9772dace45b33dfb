"""Several torchruns on this machine, each an agent of one job; a node is lost when its torchrun is killed.

With its agent die its fork server and its workers, as the kernel kills them (PR_SET_PDEATHSIG). Nothing here needs
root: a node that is cut off from the others is tested in `test_cut`, where each has a network of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.harness.hosts import Hosts
from tests.conftest import MARK, marked, run_dirs, wait_until
from tests.directory.etcd_server import free_ports
from tests.recovery.launching import JOB, Ended

LIMIT_S = 240.0
AFTER_S = 15.0
"""How long an agent may take to end after the first one that ended by itself."""


@dataclass
class Agent:
    """One torchrun. ``lost``: a test or the job has killed it."""

    process: subprocess.Popen[bytes]
    log: Path
    lost: bool = False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def text(self) -> str:
        """Its log, without what torchrun says of its options."""
        lines = self.log.read_text().splitlines()
        return "\n".join(line for line in lines if "distributed/launcher/api.py" not in line)

    def says(self, text: str) -> bool:
        return text in self.text


def _run(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@dataclass
class Nodes:
    """The agents of one job, in the order in which they were started.

    Attributes:
        nodes: what torchrun is told in --nnodes.
        workers: of each node.
        endpoint: of the rendezvous store; that of etcd, if given.
        hosts: one for each agent; None: all on this machine's own.
    """

    folder: Path
    nodes: str
    workers: int = 1
    faults: str = ""
    script: Path = JOB
    endpoint: str = ""
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    hosts: Hosts | None = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    agents: list[Agent] = field(default_factory=list)
    port: int = 0

    def start(self, count: int, **env: str) -> list[Agent]:
        """Start that many more agents. The very first one coordinates: it has the store, or the others wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = []
        if not self.agents:
            started.append(self._start(is_host="true", **env))
            first, count = started[0], count - 1
            if self.endpoint:
                wait_until(
                    lambda: first.says("coordinates the job") or first.code is not None, "a coordinator"
                )
        return started + [self._start(**env) for _ in range(count)]

    def _start(self, is_host: str = "false", **env: str) -> Agent:
        number = len(self.agents)
        log = self.folder / f"node-{number}.log"
        own = {"OUT": str(self.folder), "FAULTS": self.faults, "OMP_NUM_THREADS": "1", MARK: self.mark}
        own |= {"CHECKPOINTLESS_EVENTS": str(self.folder / "events.jsonl"), "LOGLEVEL": "INFO"}
        own |= {} if self.endpoint else {"CHECKPOINTLESS_IS_HOST": is_host}
        own |= {**self.env, **env}
        if self.hosts is not None:
            process = self.hosts[number].run(self._command(number), own, log)
        else:
            process = _run(self._command(number), own, log)
        self.agents.append(Agent(process, log))
        return self.agents[-1]

    def _command(self, number: int) -> list[str]:
        address = self.hosts[number].address if self.hosts is not None else "127.0.0.1"
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--rdzv-backend", "checkpointless-etcd" if self.endpoint else "checkpointless"]
        command += ["--rdzv-endpoint", self.endpoint or self._own_endpoint(), "--rdzv-id", self.mark]
        command += ["--local-addr", address, "--nnodes", self.nodes]
        return [*command, f"--nproc-per-node={self.workers}", *self.options, str(self.script)]

    def _own_endpoint(self) -> str:
        """Where the first agent opens the embedded store: one port for all of them."""
        if self.hosts is not None:
            return f"{self.hosts[0].address}:29400"
        self.port = self.port or free_ports(1)[0]
        return f"127.0.0.1:{self.port}"

    # ---- while it runs

    def await_file(self, name: str) -> None:
        """Wait until the job has written this file; fails at once if all agents have ended."""
        path = self.folder / name
        wait_until(lambda: path.exists() or not self.running(), f"the file {name}", LIMIT_S)
        assert path.exists(), self.text

    def go(self, name: str) -> None:
        """Let the job go on that waits for this."""
        (self.folder / f"go-{name}").touch()

    def running(self) -> list[Agent]:
        return [agent for agent in self.agents if agent.code is None]

    def agent_of(self, rank: int) -> Agent:
        """The one on whose node this rank runs."""
        pid = int((self.folder / f"agent-{rank}").read_text())
        return next(agent for agent in self.agents if agent.pid == pid)

    def await_spare(self, agent: Agent) -> None:
        wait_until(lambda: agent.says("waits as a spare") or agent.code is not None, "a spare")

    # ---- the end

    def finish(self) -> Ended:
        """Wait for the end of all; those that were killed do not count. The code is the worst of the others."""
        wait_until(lambda: any(a.code is not None and a.code >= 0 for a in self.agents), "the end", LIMIT_S)
        self.await_end()
        codes = [agent.code for agent in self.agents if agent.code is not None and agent.code >= 0]
        ranks = len(list(self.folder.glob("steps-*.log")))
        return Ended(self.folder, ranks, max(codes), self.text)

    def await_end(self) -> None:
        """Wait until no agent runs."""
        wait_until(lambda: not self.running(), f"the end of all agents\n{self.text}", AFTER_S)

    @property
    def codes(self) -> list[int | None]:
        return [agent.code for agent in self.agents]

    @property
    def text(self) -> str:
        return "\n".join(f"---- {agent.log.name}, code {agent.code}\n{agent.text}" for agent in self.agents)

    def left(self) -> list[str]:
        """What is still there of a job whose agents have ended."""
        left = [f"process {process.pid} {' '.join(process.cmdline())}" for process in self.processes()]
        return left + [f"directory {path}" for agent in self.agents for path in run_dirs(agent.pid)]

    def workers_of(self, agent: Agent) -> list[int]:
        """Processes that its fork server has forked; not the one that waits to become a worker."""
        servers = psutil.Process(agent.pid).children()
        children = [(child, server) for server in servers for child in server.children()]
        return [child.pid for child, server in children if child.cmdline() != server.cmdline()]

    def processes(self) -> list[psutil.Process]:
        return marked(self.mark)

    def kill(self) -> None:
        """End what a failed test has left."""
        for agent in self.agents:
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.process.wait()
        for process in self.processes():
            process.kill()
