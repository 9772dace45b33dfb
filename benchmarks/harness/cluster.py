"""A job on several nodes, each a host of harness.hosts with a torchrun of its own, and what can happen to a node.

The disk is shared: all nodes write into the job's folder. node-<number>.log is what the node's torchrun writes, over
all times that it was started."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from harness import etcd
from harness.hosts import Host, Hosts
from harness.job import OURS, Job, JobFailedError, Plan, Running, below, end_of
from harness.steps import newest_process

PORT = 29400  # of the embedded store, on the first node
GRACE = 30.0  # seconds that the other agents have to end when one has ended
WARM = 15.0  # seconds after which an agent that says nothing is taken for a warm spare
SPARE = re.compile(r"waits as a spare")
COORDINATES = re.compile(r"\[term (\d+)\] this agent coordinates the job")


@dataclass
class Node:
    """One host and the torchrun that runs on it.

    Attributes:
        agent: its torchrun, running or ended.
        starts: how often a torchrun was started here.
        since: when the one that runs now was, by time.monotonic().
        written: bytes of the log before that.
        struck: something was done to the agent that runs now, so how it ends says nothing about the job.
    """

    number: int
    host: Host
    log: Path
    agent: subprocess.Popen[bytes]
    starts: int = 1
    since: float = field(default_factory=time.monotonic)
    written: int = 0
    struck: bool = False

    def __str__(self) -> str:
        return f"node {self.number}"

    @property
    def counts(self) -> bool:
        return not self.struck

    @property
    def is_warm(self) -> bool:
        """Whether the agent has said that it waits as a spare, or has had time to become one."""
        said = self.log.read_bytes()[self.written :].decode(errors="replace")
        return bool(SPARE.search(said)) or time.monotonic() - self.since > WARM


def start(plan: Plan) -> Running:
    """The job of the plan: plainly on this machine, or on hosts if it has several nodes."""
    return Job(plan) if plan.nodes + plan.spares == 1 else Cluster(plan)


def coordinator_of(logs: Sequence[str]) -> int | None:
    """Which of these logs of agents has the highest term in which its agent coordinates the job."""
    terms = [
        (int(found.group(1)), number)
        for number, log in enumerate(logs)
        for found in COORDINATES.finditer(log)
    ]
    return max(terms)[1] if terms else None


class Cluster(Running):
    """A running job of several nodes; leaves no host and no process behind."""

    def __init__(self, plan: Plan) -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        self.nodes: list[Node] = []
        self._etcd: dict[int, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()
        try:
            self.hosts = self._stack.enter_context(Hosts(plan.nodes + plan.spares))
            self._start()
        except BaseException:
            self._stack.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def running(self) -> bool:
        """Until the first agent to which nothing was done has ended: the others end with it."""
        return all(node.agent.poll() is None for node in self.nodes if node.counts)

    def processes(self) -> list[psutil.Process]:
        return [process for node in self.nodes for process in below(node.agent)]

    def code(self, timeout: float) -> int:
        """The first exit code that is not 0, of all agents to which nothing was ever done, or else of all others.

        All agents fail with a job that fails. One that was started again may have come when the job was over."""
        end = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > end:
                raise JobFailedError(
                    f"{self.plan.script.name} did not end within {timeout:g} s. {self.tail()}"
                )
            time.sleep(0.02)
        left = [node for node in self.nodes if node.counts]
        codes = [self._code_of(node) for node in [n for n in left if n.starts == 1] or left]
        return next((code for code in codes if code), 0)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(end_of(node.log, lines) for node in self.nodes)

    def coordinator(self) -> Node | None:
        """The node whose agent said last, by its term, that it coordinates the job; None where none did."""
        number = coordinator_of([node.log.read_text(errors="replace") for node in self.nodes])
        return self.nodes[number] if number is not None else None

    def placement(self) -> dict[int, Node]:
        """On which node each rank's newest process runs; without the ranks whose process is gone."""
        found: dict[int, Node] = {}
        for rank in range(self.plan.ranks):
            pid = newest_process(self.plan.folder, rank)
            places = [node for node in self.nodes if pid is not None and node.host.has(pid)]
            found.update((rank, node) for node in places)
        return found

    def ranks_of(self, node: Node) -> list[int]:
        return [rank for rank, place in self.placement().items() if place is node]

    def spares(self) -> list[Node]:
        """Nodes with an unharmed agent and without ranks."""
        taken = {node.number for node in self.placement().values()}
        return [n for n in self.nodes if n.counts and n.agent.poll() is None and n.number not in taken]

    def holds_store(self, node: Node) -> bool:
        """Whether the node's loss takes a store away that has no other member."""
        return self.plan.store == "c10d" and node.number == 0

    def cut(self, node: Node) -> None:
        """Nothing reaches or leaves the node any more; its processes live on."""
        node.struck = True
        node.host.cut()

    def power_off(self, node: Node) -> None:
        node.struck = True
        node.host.kill()

    def pause(self, node: Node) -> None:
        """The agent stands still; its workers and connections do not."""
        node.struck = True
        node.agent.send_signal(signal.SIGSTOP)

    def resume(self, node: Node) -> None:
        node.agent.send_signal(signal.SIGCONT)

    def kill_agent(self, node: Node) -> None:
        node.struck = True
        node.agent.kill()
        node.agent.wait()

    def start_again(self, node: Node) -> None:
        """A fresh agent on a node whose agent has ended; on a host that is off, the host is switched on first."""
        if not node.host.is_on:
            node.host.heal()
            if self.plan.store == "etcd" and node.number < etcd.MEMBERS:
                self._start_member(node.number)
        node.written, node.since = node.log.stat().st_size, time.monotonic()
        node.agent = self._agent(node.host, node.number, node.starts)
        node.starts += 1
        node.struck = False

    def reboot(self, node: Node) -> None:
        """Power off and on, and a fresh agent."""
        self.power_off(node)
        self.start_again(node)

    def kill_member(self, number: int) -> None:
        """etcd dies on this node, and nothing else."""
        self._etcd[number].kill()
        self._etcd[number].wait()

    def start_member_again(self, number: int) -> None:
        """Blocks until the member serves clients."""
        member, folder = self._members()[number], self.plan.folder
        since = etcd.log_of(member, folder).stat().st_size
        self._start_member(number)
        etcd.wait_ready(member, folder, since=since)

    def _start_member(self, number: int) -> None:
        self._etcd[number] = etcd.start(self._members()[number], self._members(), self.plan.folder)

    def _start(self) -> None:
        if self._ours_with_etcd():
            for number in range(len(self._members())):
                self._start_member(number)
            for member in self._members():
                etcd.wait_ready(member, self.plan.folder)
        used = self.hosts if self.plan.backend == OURS else self.hosts.first(self.plan.nodes)
        for number, host in enumerate(used):
            agent = self._agent(host, number, 0)
            self.nodes.append(Node(number, host, self._log_of(number), agent))

    def _agent(self, host: Host, number: int, start: int) -> subprocess.Popen[bytes]:
        options = self._options(host)
        command = self.plan.torchrun(*options, logs=f"logs/node-{number}-{start}")
        return host.run(command, {**self.plan.variables(), "LOGLEVEL": "INFO"}, self._log_of(number))

    def _options(self, host: Host) -> tuple[str, ...]:
        """Rendezvous backend and everything that differs from a job of one node."""
        plan, ours = self.plan, self.plan.backend == OURS
        most = plan.nodes + plan.spares if ours else plan.nodes
        etcds = self._ours_with_etcd()
        return (
            f"{plan.backend}-etcd" if etcds else plan.backend,
            *(
                "--rdzv-endpoint",
                etcd.endpoint(self._members()) if etcds else f"{self.hosts[0].address}:{PORT}",
            ),
            *("--rdzv-id", "cluster", "--nnodes", f"{plan.nodes}:{most}", "--local-addr", host.address),
        )

    def _ours_with_etcd(self) -> bool:
        return self.plan.backend == OURS and self.plan.store == "etcd"

    def _members(self) -> list[Host]:
        return self.hosts.first(etcd.MEMBERS)

    def _log_of(self, number: int) -> Path:
        return self.plan.folder / f"node-{number}.log"

    def _code_of(self, node: Node) -> int:
        """A node that was started again so late that the job was over has nothing to end with."""
        try:
            return node.agent.wait(GRACE)
        except subprocess.TimeoutExpired as error:
            if node.starts > 1:
                return 0
            raise JobFailedError(
                f"The agent of {node} did not end within {GRACE:g} s of the first. {end_of(node.log, 30)}"
            ) from error
