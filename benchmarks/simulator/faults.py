"""Schedules of faults, drawn from a seed: what fails, and at which moment of the protocol.

A *gentle* schedule waits after each fault until the job has committed a step again and everyone is connected, and
never takes an agent and its guardian: no restart of the script is allowed. In a *wild* one faults fall into each
other; the script may be run again where what was lost was the last copy, but the job must still end well, since nodes
that crash come back. One agent with a seat, the anchor, only ever loses workers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from checkpointless_elastic.protocol.between import Between, Order
from checkpointless_elastic.protocol.requests import Drain
from simulator.agent import Agent
from simulator.world import World

__all__ = ["Faults", "plan"]

KINDS = {
    "worker": 4,
    "crash": 2,
    "silent": 1,
    "coordinator": 2,
    "coordinator silent": 1,
    "pause": 1.5,
    "coordinator pause": 1.5,
    "cut": 1,
    "cut silent": 0.5,
    "partition": 1.5,
    "store down": 1,
    "store cut": 1,
    "slow": 0.5,
    "join": 0.5,
    "drain": 1.5,
    "terminate": 1,
}
GENTLE = {
    "worker": 3,
    "crash": 2,
    "silent": 1,
    "coordinator": 2,
    "coordinator silent": 1,
    "pause": 1,
    "drain": 1,
    "terminate": 0.5,
}
MOMENTS = [
    *[
        "Freeze",
        "Answers",
        "Decision",
        "Gathered",
        "Restore",
        "Rebuild",
        "Resume",
        "Commit",
        "Seated",
        "Join",
    ],
    *["Reseated", "RunAgain", "ReplaceRank", "RankGone", "NodeEnded", "Release", "Done", "Spare", "Turned"],
]


DRAIN_TRIES = 30
"""How often a client asks until it gives up, ten times a second."""


@dataclass(frozen=True)
class Fault:
    """What fails: ``wait`` seconds after the last one, or with the ``nth`` message of a kind after it.

    ``sender``: strikes who sends that message, when the kind leaves it open.
    """

    kind: str
    wait: float
    message: str = ""
    nth: int = 0
    sender: bool = False


def plan(
    draw: random.Random, count: int, gentle: bool, agents: int, only: tuple[str, ...] = ()
) -> list[Fault]:
    """A schedule, of these kinds only if some are named."""
    kinds = dict.fromkeys(only, 1.0) if only else GENTLE if gentle else KINDS
    chosen = draw.choices(list(kinds), weights=list(kinds.values()), k=count)
    return [_fault(draw, kind, gentle, agents) for kind in chosen]


def _fault(draw: random.Random, kind: str, gentle: bool, agents: int) -> Fault:
    wait = draw.random() * draw.choice([0.005, 0.02, 0.1, 0.3, 0.3, 4.0])
    if gentle or draw.random() < 0.4:
        return Fault(kind, wait)
    nth = draw.randrange(1, max(3, draw.choice([3, agents, 3 * agents])))
    return Fault(kind, 1.0, draw.choice(MOMENTS), nth, draw.random() < 0.5)


@dataclass
class Faults:
    """Strikes one world by a schedule."""

    world: World
    schedule: list[Fault]
    gentle: bool
    draw: random.Random
    _next: int = -1
    _seen: int = 0
    _commits: int = 0
    _anchor: Agent | None = None
    _strikes: dict[str, Callable[[Agent | None], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._strikes = {
            "worker": self._worker,
            "crash": lambda agent: self._crash(agent or self._victim(), False),
            "silent": lambda agent: self._crash(agent or self._victim(), True),
            "coordinator": lambda agent: self._crash(self.world.coordinator(), False),
            "coordinator silent": lambda agent: self._crash(self.world.coordinator(), True),
            "pause": lambda agent: self._pause(agent or self._victim()),
            "coordinator pause": lambda agent: self._pause(self.world.coordinator()),
            "cut": lambda agent: self._cut(agent or self._victim(), False),
            "cut silent": lambda agent: self._cut(agent or self._victim(), True),
            "partition": self._partition,
            "store down": self._store_down,
            "store cut": self._store_cut,
            "slow": self._slow,
            "join": lambda agent: self._join(),
            "drain": lambda agent: self._drain(agent or self._drained()),
            "terminate": lambda agent: self._terminate(agent or self._drained()),
        }
        self.world.on_send.append(self._sent)
        self._arm()

    # ---- when

    def _arm(self) -> None:
        self._next += 1
        self._seen = 0
        self._commits = self.world.oracle.commits
        if self._next < len(self.schedule):
            self.world.last_fault = self.world.clock.now
            fault = self.schedule[self._next]
            if self.gentle or not self._next:
                self.world.clock.after(0.01, self._when_calm, self._next, fault.wait)
            else:
                self.world.clock.after(fault.wait, self._due, self._next)

    def _when_calm(self, number: int, wait: float) -> None:
        if number != self._next or not self.world.live():
            return
        if self._calm():
            self.world.clock.after(wait, self._due_when_calm, number)
        else:
            self.world.clock.after(0.02, self._when_calm, number, wait)

    def _due_when_calm(self, number: int) -> None:
        if number == self._next and self.gentle and not self._calm():
            self._when_calm(number, 0.0)
        else:
            self._due(number)

    def _calm(self) -> bool:
        """Has a step been committed since the last fault, and is nobody missing?"""
        world, chair = self.world, self.world.coordinator()
        if not self.gentle:
            return True
        board = chair.member.board if chair is not None else None
        if board is None or board.coordinator is None or world.oracle.commits < self._commits + 2:
            return False
        seated = {agent.seat for agent in world.live() if agent.seat >= 0 and not agent.frozen}
        spare = any(agent.seat < 0 and agent.member.state.value == "following" for agent in world.live())
        if world.job.shrinks:  # it has grown back
            spare = len(seated) == world.job.agents and not board.coordinator.fresh
        whole = board.coordinator.state.value == "running" and len(board.bases) == len(seated)
        return whole and spare and all(agent.workers for agent in world.live() if agent.seat >= 0)

    def _sent(self, agent: Agent, message: Between) -> None:
        if self._next >= len(self.schedule):
            return
        fault = self.schedule[self._next]
        inner = message.message if isinstance(message, Order) else message
        if fault.message and type(inner).__name__ == fault.message:
            self._seen += 1
            if self._seen == fault.nth:
                self._strike(fault, agent if fault.sender else None)

    def _due(self, number: int) -> None:
        if number == self._next and self.world.live():
            self._strike(self.schedule[number], None)

    def _strike(self, fault: Fault, agent: Agent | None) -> None:
        if self._anchor is None:
            seated = [agent for agent in self.world.live() if agent.seat >= 0]
            if not seated:
                if agent is None:
                    self.world.clock.after(0.05, self._due, self._next)
                return
            self._anchor = self.draw.choice(seated)
        self.world.note(f"FAULT {fault}")
        self.world.faults += bool(self.world.live()) and not self.world.directory.verdict
        self._strikes[fault.kind](agent if agent is not self._anchor else None)
        self._arm()

    # ---- what

    def _victim(self) -> Agent | None:
        others = [agent for agent in self.world.live() if agent is not self._anchor]
        seated = [agent for agent in others if agent.seat >= 0]
        return (
            self.draw.choice(seated if seated and self.draw.random() < 0.85 else others) if others else None
        )

    def _worker(self, agent: Agent | None) -> None:
        chosen = agent if agent is not None and agent.workers else None
        hosts = [host for host in self.world.live() if host.workers]
        if chosen or hosts:
            host = chosen or self.draw.choice(hosts)
            for rank in self.draw.sample(
                sorted(host.workers), 1 if self.draw.random() < 0.8 else len(host.workers)
            ):
                self.world.clock.after(0.001 * self.draw.random(), host.kill, rank)

    def _crash(self, agent: Agent | None, silent: bool) -> None:
        if agent is not None and agent is not self._anchor and agent.alive:
            self.world.crash(agent, silent, back=self.draw.random() * 3)

    def _for_a_while(self, longest: float, undo: Callable[[], None]) -> None:
        lasts = self.draw.random() * self.draw.choice([0.1, 1.0, longest])
        self.world.clock.after(lasts, self._undo, undo)

    def _undo(self, undo: Callable[[], None]) -> None:
        self.world.last_fault = self.world.clock.now
        self.world.note("the fault is over")
        undo()

    def _pause(self, agent: Agent | None) -> None:
        if agent is not None and agent is not self._anchor and not agent.frozen:
            self.world.note(f"{agent.name} pauses")
            agent.frozen = True
            self._for_a_while(6.0, agent.thaw)

    def _cut(self, agent: Agent | None, silent: bool) -> None:
        links = self.world.network.links(agent) if agent is not None else []
        if agent is None or not links:
            return
        up = [link for link in links if link > 0]
        if up and agent is not self._anchor:
            self.world.note(f"the connection of {agent.name} breaks")
            self.world.network.cut(agent, self.draw.choice(up), silent)

    def _partition(self, agent: Agent | None) -> None:
        share = self.draw.choice([0.2, 0.5, 0.8])
        for host in self.world.agents.values():
            if host is not self._anchor and self.draw.random() < share:
                host.side = 1
        if self.draw.random() < 0.3 and agent is not None:
            agent.side = 1
        cut_off = [host.name for host in self.world.live() if host.side]
        self.world.note(f"cut off: {cut_off}")
        self._for_a_while(6.0, self._together)

    def _together(self) -> None:
        for host in self.world.agents.values():
            host.side = 0
        self.world.network.heal()

    def _store_down(self, agent: Agent | None) -> None:
        self.world.directory.down = True
        self._for_a_while(6.0, self._store_up)

    def _store_up(self) -> None:
        self.world.directory.down = False

    def _store_cut(self, agent: Agent | None) -> None:
        for host in [agent] if agent is not None else [self.world.coordinator(), self._victim()]:
            if host is not None and host is not self._anchor:
                host.storeless = True
        self._for_a_while(6.0, self._stores)

    def _stores(self) -> None:
        for host in self.world.agents.values():
            host.storeless = False

    def _slow(self, agent: Agent | None) -> None:
        self.world.network.slow = self.draw.choice([0.05, 0.5])
        self._for_a_while(6.0, self._fast)

    def _fast(self) -> None:
        self.world.network.slow = 0.0

    def _join(self) -> None:
        self.world.add_agent()

    def _drained(self) -> Agent | None:
        """Often the coordinator's own node."""
        return self.world.coordinator() if self.draw.random() < 0.3 else self._victim()

    def _drain(self, agent: Agent | None) -> None:
        if agent is not None and agent is not self._anchor:
            self._ask(agent, self.draw.random() < 0.4, DRAIN_TRIES)

    def _ask(self, agent: Agent, keep: bool, tries: int) -> None:
        """The coordinator, as a client does: again and again while what stands in the way passes."""
        chair = self.world.coordinator()
        if chair is not None and agent.alive and not chair.frozen:
            declined = chair.consult(Drain(agent.seat, agent.name, keep))
            if declined is None:
                self.world.last_fault = self.world.clock.now
                self.world.drains += 1
                self.world.note(f"{agent.name} is drained" + (", and stays" if keep else ""))
                return
            self.world.trace(f"{agent.name} is not drained: {declined.reason}")
            tries = tries if declined.again else 0
        if tries and agent.alive and not self.world.directory.verdict:
            self.world.clock.after(0.1, self._ask, agent, keep, tries - 1)

    def _terminate(self, agent: Agent | None) -> None:
        if agent is not None and agent is not self._anchor and agent.alive:
            agent.hear(agent.terminate)
