"""What the protocol costs: messages and bytes of an ordinary agent and of the coordinator, by number of agents."""

from __future__ import annotations

import statistics
from typing import TypedDict

from checkpointless_elastic.protocol.events import Action, Reached
from simulator.agent import Agent
from simulator.world import Job, World

__all__ = ["Cost", "Costs", "measure"]

STEPS = 3
"""Steps that are counted, after as many that are not."""


class Cost(TypedDict):
    """Sent and taken, without heartbeats. ``median`` and ``most``: of agents but the coordinator."""

    messages_median: float
    messages_most: float
    bytes_median: float
    bytes_most: float
    coordinator_messages: float
    coordinator_bytes: float


class Costs(TypedDict):
    """Of one number of agents. ``links``: connections of the coordinator; ``links_most``: of any other agent."""

    agents: int
    events: int
    links: int
    links_most: int
    beats_median: float
    coordinator_beats: float
    step: Cost
    worker_recovery: Cost
    node_recovery: Cost


class _Phases:
    """Counts from one commit to another: steps, then the recovery of a worker, then that of a node."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.costs: dict[str, Cost] = {}
        self.beats: dict[str, float] = {}
        self.links = (0, 0)
        self._phase = "start"
        self._coordinator = ""
        world.traffic.weigh = True
        world.on_reach.append(self._reached)

    def committed(self) -> None:
        """A step was committed."""
        commits = self.world.oracle.commits
        if self._phase == "start" and commits == STEPS:
            self._count("step")
        elif self._phase == "step" and commits == 2 * STEPS:
            self._done(STEPS)
            self._note_links()
            self._count("worker_recovery")
            self._victim().kill(min(self._victim().workers))

    def _victim(self) -> Agent:
        """The agent that is farthest from the coordinator."""
        seated = [agent for agent in self.world.live() if agent.seat >= 0 and not agent.coordinates]
        return max(seated, key=lambda agent: agent.seat)

    def _reached(self, agent: Agent, action: Action) -> None:
        if not isinstance(action, Reached) or action.point != "committed":
            return
        if self._phase == "worker_recovery":
            self._done(1)
            self._count("node_recovery")
            self.world.crash(self._victim(), silent=False, back=None)
        elif self._phase == "node_recovery":
            self._done(1)
            self._phase = "end"

    def _count(self, phase: str) -> None:
        self._phase = phase
        self._began = self.world.clock.now
        chair = self.world.coordinator()
        assert chair is not None
        self._coordinator = chair.name
        self.world.traffic.clear()

    def _note_links(self) -> None:
        counts = {agent: len(self.world.network.links(agent)) for agent in self.world.live()}
        chair = self.world.coordinator()
        assert chair is not None
        self.links = counts.pop(chair), max(counts.values())

    def _done(self, steps: int) -> None:
        traffic, names = self.world.traffic, [agent.name for agent in self.world.live() if agent.seat >= 0]
        others = [name for name in names if name != self._coordinator]
        messages = [traffic.messages[name] / steps for name in others]
        size = [traffic.bytes[name] / steps for name in others]
        self.costs[self._phase] = Cost(
            messages_median=statistics.median(messages),
            messages_most=max(messages),
            bytes_median=statistics.median(size),
            bytes_most=max(size),
            coordinator_messages=traffic.messages[self._coordinator] / steps,
            coordinator_bytes=traffic.bytes[self._coordinator] / steps,
        )
        beats = max(1.0, (self.world.clock.now - self._began) / self.world.rules.heartbeat)
        if self._phase == "step":
            median = statistics.median(traffic.beats[name] for name in others)
            self.beats = {"median": median / beats, "coordinator": traffic.beats[self._coordinator] / beats}


def measure(agents: int) -> Costs:
    """Simulate one job of this many agents with a worker and then a node lost."""
    job = Job(agents=agents, spares=1, steps=2 * STEPS + 4, compute=(0.3, 0.4), leaves=0.0)
    world = World(job, seed=agents)
    phases = _Phases(world)
    commits = -1
    while phases.costs.keys() < {"step", "worker_recovery", "node_recovery"} and world.clock.step():
        if world.oracle.commits != commits:
            commits = world.oracle.commits
            phases.committed()
    return Costs(
        agents=agents,
        events=world.clock.events,
        links=phases.links[0],
        links_most=phases.links[1],
        beats_median=phases.beats["median"],
        coordinator_beats=phases.beats["coordinator"],
        step=phases.costs["step"],
        worker_recovery=phases.costs["worker_recovery"],
        node_recovery=phases.costs["node_recovery"],
    )
