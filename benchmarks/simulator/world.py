"""One job in virtual time: its agents and spares, what happens to them, and how it ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from checkpointless_elastic.protocol.acts import Restarting
from checkpointless_elastic.protocol.between import Between, Join, Order, Seated
from checkpointless_elastic.protocol.events import Action, Chosen, Opened, Reached, Resized
from checkpointless_elastic.protocol.messages import Message
from checkpointless_elastic.protocol.rules import OnLoss, Rules
from simulator.agent import Agent
from simulator.clock import Clock
from simulator.directory import Directory
from simulator.measure import Traffic
from simulator.network import Network
from simulator.oracle import Oracle, Violation

__all__ = ["Job", "Mutations", "World"]

BOUND_S = 90.0
"""After the last fault the job must end within this time."""


@dataclass(frozen=True)
class Job:
    """What is simulated. ``compute``: seconds of a step, from and to; ``fixed``: one delay for every message.

    ``leave_early``: share of workers that end without waiting for the others; ``leaves``: of those that leave a void
    attempt early; ``node_faults``: see Config; ``shrinks``: on_loss=shrink.
    """

    agents: int = 4
    spares: int = 1
    size: int = 1
    steps: int = 8
    compute: tuple[float, float] = (0.01, 0.06)
    leave_early: float = 0.0
    leaves: float = 0.3
    fixed: float | None = None
    fan_out: int = 32
    node_faults: int = 0
    shrinks: bool = False


@dataclass(frozen=True)
class Mutations:
    """Rules that the model of an agent or worker breaks on purpose, to see that it is noticed."""

    deaf: bool = False


@dataclass
class World:
    """See the module.

    Attributes:
        steps, size: of the job.
        limits: by name in Config, seconds.
        restarts: why the script was run again, each time.
        resizes: numbers of ranks before and after, and the step, each time that their number was changed.
        drains: how many nodes were drained by a client.
        late: which ranks were ended since they had missed a deadline, each time.
        last_fault: when.
    """

    job: Job
    seed: int
    mutations: Mutations = field(default_factory=Mutations)
    tell: Callable[[str], None] | None = None
    story: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        job = self.job
        self.random = random.Random(self.seed)
        self.clock = Clock()
        self.steps, self.size, self.leave_early = job.steps, job.size, job.leave_early
        nodes = job.agents + job.spares
        self.rules = Rules(
            active_nodes=job.agents,
            max_nodes=max(2, nodes + 1000),
            max_restarts=100,
            max_faults_per_step=1000,
            node_faults=job.node_faults,
            on_loss=OnLoss.SHRINK if job.shrinks else OnLoss.WAIT,
            loss_timeout=60.0,
            fan_out=job.fan_out,
        )
        self.limits = {"settle_timeout": 20.0, "join_timeout": 30.0}
        self.network = Network(self.clock, self.random, self.rules.detection, job.fixed)
        self.directory = Directory(self.clock, self.network)
        self.oracle = Oracle()
        self.traffic = Traffic()
        self.agents: dict[str, Agent] = {}  # by address
        self.restarts: list[str] = []
        self.late: list[str] = []
        self.resizes: list[tuple[int, int, int]] = []
        self.drains = 0
        self.faults = 0  # that struck before the job had ended
        self.last_fault = 0.0
        self.killed_at_end = False  # a worker that had finished died: the job may end with its exit code
        self.on_send: list[Callable[[Agent, Between], None]] = []
        self.on_reach: list[Callable[[Agent, Action], None]] = []
        self._pids = self._stores = self._named = 0
        self._members: tuple[Sequence[int], frozenset[int]] = ((), frozenset())
        for _ in range(nodes):
            self.add_agent()

    # ---- agents

    def add_agent(self) -> Agent:
        """A node joins."""
        agent = Agent(self, f"a{self._named}")
        self._named += 1
        self.agents[agent.address] = agent
        return agent

    def live(self) -> list[Agent]:
        """Agents whose process runs."""
        return [agent for agent in self.agents.values() if agent.alive]

    def ended(self, agent: Agent) -> None:
        """A process ends in good order; a node that gave up is started again later, if the job still runs."""
        agent.alive = False
        self.network.lose(agent, silent=False)
        if agent.verdict.startswith("out") and not self.directory.verdict:
            self.clock.after(3.0, self._newcomer)

    def _newcomer(self) -> None:
        if not self.directory.verdict and self.live():
            self.add_agent()

    def crash(self, agent: Agent, silent: bool, back: float | None) -> None:
        """The process ends at once with its workers, or (silent) its machine; a new one comes ``back`` s later."""
        self.note(f"{agent.name} crashes" + (" in silence" if silent else ""))
        agent.alive, agent.answers = False, not silent
        for worker in agent.workers.values():
            worker.alive = False
        self.network.lose(agent, silent)
        if back is not None:
            self.clock.after(back, self._newcomer)

    def coordinator(self) -> Agent | None:
        """Of the newest term, if it lives."""
        for agent in self.agents.values():
            if (
                agent.alive
                and agent.coordinates
                and self.directory.owners.get(self.directory.term) == agent.name
            ):
                return agent
        return None

    # ---- what agents need of the world

    def draw_local(self) -> float:
        return self.job.fixed / 10 if self.job.fixed else 0.00002 + 0.0002 * self.random.random()

    def draw_fork(self) -> float:
        return 0.01 if self.job.fixed else 0.003 + 0.02 * self.random.random()

    def draw_compute(self) -> float:
        low, high = self.job.compute
        return low + (high - low) * self.random.random()

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids

    def open_store(self, agent: Agent) -> str:
        self._stores += 1
        return f"{agent.name}:store{self._stores}"

    def members(self, ranks: Sequence[int]) -> frozenset[int]:
        """As a set; the same list is asked for by many workers, one after the other."""
        if self._members[0] is not ranks:
            self._members = (ranks, frozenset(ranks))
        return self._members[1]

    # ---- what is watched

    def note(self, sentence: str) -> None:
        """For the trace and for stories."""
        self.trace(sentence)
        if self.story is not None:
            self.story(sentence)

    def trace(self, sentence: str) -> None:
        """For the trace."""
        if self.tell is not None:
            self.tell(f"{self.clock.now:9.4f} {sentence}")

    def sent(self, agent: Agent, message: Between) -> None:
        self.traffic.sent(agent.name, message)
        if isinstance(message, Order) and agent.coordinates:  # others pass orders on
            self.oracle.ordered(self.directory.owners.get(message.term, ""), agent.name, message.term)
        if isinstance(message, Seated):
            since = self.clock.now - self.directory.claimed
            self.oracle.gave_seat(agent.name, message.term, self.directory.term, since)
        for watch in self.on_send:
            watch(agent, message)

    def took(self, agent: Agent, message: Between) -> None:
        self.traffic.took(agent.name, message)
        if self.tell is not None:
            self.trace(f"{agent.name} <- {short(message)}")

    def copied(self, agent: Agent, guardian: Agent) -> None:
        self.traffic.copied(agent.name, guardian.name)

    def obeys(self, agent: Agent, message: Message) -> None:
        if self.tell is not None:
            self.trace(f"{agent.name} obeys {short(message)}")

    def performs(self, agent: Agent, action: Action) -> None:
        if isinstance(action, Restarting):
            self.restarts.append(f"step {action.step}: {action.reason}")
        if isinstance(action, Chosen) and action.ends:
            self.late.append(f"step {action.step}: {action.what}")
            self.note(f"{agent.name}: {action.what}: {action.reason}")
        if isinstance(action, Resized):
            self.resizes.append((action.before, action.after, action.step))
        if isinstance(action, (Opened, Reached, Resized, Restarting)):
            self.note(f"{agent.name}: {told(action)}")
        for watch in self.on_reach:
            watch(agent, action)

    # ---- running

    def run(self) -> None:
        """Until all agents have ended. Raises Violation."""
        while self.clock.step():
            if not any(agent.alive for agent in self.agents.values()):
                break
            if self.clock.now > self.last_fault + BOUND_S:
                if self._over():
                    break
                raise Violation(f"the job hangs: {self.where()}")
        self.judge()

    def _over(self) -> bool:
        """Agents that came after the end wait for others that do not come, if the directory did not hear of it."""
        return any(agent.verdict == "succeeded" for agent in self.agents.values()) and not any(
            agent.seat >= 0 for agent in self.live()
        )

    def judge(self) -> None:
        """How has the job ended?"""
        for agent in self.agents.values():
            if agent.workers and any(worker.alive for worker in agent.workers.values()):
                raise Violation(f"{agent.name} has ended and its workers live")
        verdicts = {agent.verdict for agent in self.agents.values() if agent.verdict} | {
            self.directory.verdict
        }
        verdicts = {verdict for verdict in verdicts if verdict and not verdict.startswith("out")}
        badly = all(verdict.startswith("failed: all ranks had finished") for verdict in verdicts)
        if verdicts and badly and self.killed_at_end:
            return
        if verdicts != {"succeeded"}:
            raise Violation(f"the job ended with {verdicts}")

    def where(self) -> str:
        """Where everybody stands."""
        lines = []
        for agent in self.live():
            board = agent.member.board
            line = f"{agent.name} {agent.member.state.value} term {agent.member.term} seat {agent.seat}"
            if agent.frozen:
                line += " frozen"
            if agent.station is not None:
                line += f" generation {agent.station.generation} step {agent.station.step}"
            for worker in agent.workers.values():
                waits = worker.waiting.__name__ if worker.waiting else "computes"
                line += f" [{worker.rank}: {worker.generation}/{worker.frozen} step {worker.step} {waits}]"
            if board is not None and board.coordinator is not None:
                it = board.coordinator
                line += f" COORDINATES {it.state.value} generation {it.generation} step {it.step}"
            lines.append(line)
        return "; ".join(lines[:40])


def short(message: Message) -> str:
    """For the trace."""
    if isinstance(message, Order):
        return f"term {message.term} {short(message.message)}"
    if isinstance(message, Join):
        return f"Join {message.agent}" + (f" with {message.standing}" if message.standing else "")
    return str(message)[:300]


def told(action: Opened | Reached | Resized | Restarting) -> str:
    """A point of a recovery, as a sentence."""
    if isinstance(action, Opened):
        return f"generation {action.generation} is open, ranks {sorted(action.lost)} are lost: {action.cause}"
    if isinstance(action, Resized):
        return (
            f"{action.before} ranks become {action.after} in generation {action.generation}, at step {action.step}: "
            f"{action.reason}"
        )
    if isinstance(action, Restarting):
        return (
            f"the script is run again in generation {action.generation}, rung {action.rung}: {action.reason}"
        )
    if action.point == "frozen":
        return (
            f"all have answered, they go on at step {action.details['step']} ({action.details['decision']})"
        )
    if action.point == "committed":
        return f"step {action.details['step']} is committed, the first one in generation {action.generation}"
    return f"generation {action.generation}: {action.point}"
