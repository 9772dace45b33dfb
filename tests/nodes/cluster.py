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

from tests.conftest import MARK, marked, run_dirs, wait_until
from tests.directory.etcd_server import free_ports
from tests.recovery.launching import JOB, Ended

LIMIT_S = 90.0
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
        return self.log.read_text()

    def says(self, text: str) -> bool:
        return text in self.text


@dataclass
class Nodes:
    """The agents of one job, in the order in which they were started.

    Attributes:
        nodes: what torchrun is told in --nnodes.
        workers: of each node.
        endpoint: of the rendezvous store; that of etcd, if given.
    """

    folder: Path
    nodes: str
    workers: int = 1
    faults: str = ""
    script: Path = JOB
    endpoint: str = ""
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    agents: list[Agent] = field(default_factory=list)

    def start(self, count: int, **env: str) -> list[Agent]:
        """Start that many more agents. The very first one coordinates: the others wait for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = []
        if not self.agents:
            started.append(self._start(is_host="true", **env))
            first, count = started[0], count - 1
            wait_until(lambda: first.says("coordinates the job") or first.code is not None, "a coordinator")
        return started + [self._start(**env) for _ in range(count)]

    def _start(self, is_host: str = "false", **env: str) -> Agent:
        etcd = bool(self.endpoint)
        port = self._port = getattr(self, "_port", 0) or free_ports(1)[0]
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--rdzv-backend", "checkpointless-etcd" if etcd else "checkpointless"]
        command += ["--rdzv-endpoint", self.endpoint or f"127.0.0.1:{port}", "--rdzv-id", self.mark]
        command += ["--local-addr", "127.0.0.1", "--nnodes", self.nodes]
        command += [f"--nproc-per-node={self.workers}", *self.options, str(self.script)]
        log = self.folder / f"node-{len(self.agents)}.log"
        own = {"OUT": str(self.folder), "FAULTS": self.faults, "OMP_NUM_THREADS": "1", MARK: self.mark}
        own |= {"CHECKPOINTLESS_EVENTS": str(self.folder / "events.jsonl"), "LOGLEVEL": "INFO"}
        own |= {} if etcd else {"CHECKPOINTLESS_IS_HOST": is_host}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **own, **self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.agents.append(Agent(process, log))
        return self.agents[-1]

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
        wait_until(lambda: not self.running(), f"the end of all agents\n{self.text}", AFTER_S)
        codes = [agent.code for agent in self.agents if agent.code is not None and agent.code >= 0]
        ranks = len(list(self.folder.glob("steps-*.log")))
        return Ended(self.folder, ranks, max(codes), self.text)

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
