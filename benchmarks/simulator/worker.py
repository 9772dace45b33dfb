"""One incarnation of one rank, as the session behaves: a listener that answers Freeze, and a main thread that votes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from checkpointless_elastic.protocol.checks import Published
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    FromWorker,
    Frozen,
    Hold,
    Left,
    Mismatch,
    Phase,
    Protected,
    Rebuild,
    Release,
    Replicas,
    Report,
    Restore,
    Resume,
    Stage,
    ToWorker,
)
from simulator.oracle import Run, Violation

if TYPE_CHECKING:
    from simulator.agent import Agent

__all__ = ["Worker"]


class Worker:
    """Attributes: ``weights``: see `oracle`; ``waiting``: for what the main thread waits; None: it computes."""

    def __init__(self, agent: Agent, rank: int, run: Run) -> None:
        self.agent, self.rank, self.run = agent, rank, run
        self.alive, self.connected, self.doomed = True, False, False
        self.shadow = self.returns = False
        self.generation = self.frozen = -1
        self.weights: list[int] = []
        self.phase = Phase.COMPUTING
        self.waiting: type | None = None
        self.decision: Decision | None = None
        self._votes: deque[ToWorker] = deque()
        self._down = {
            True: 0.0,
            False: 0.0,
        }  # when what was sent last arrives, on the control channel or the other
        self._up = {True: 0.0, False: 0.0}
        self._world = agent.world
        self._introduces = 1  # after so many steps it says what it holds
        self._attempts = 0  # a compute that was asked for in another attempt does not count
        self._world.clock.after(self._world.draw_fork(), self._connect)

    @property
    def step(self) -> int:
        return len(self.weights)

    def belongs(self) -> bool:
        """See oracle.Doomed."""
        return self.alive and self._world.oracle.owns(self.run.restarts, self.agent.seat, self.agent.name)

    # ---- channels

    def _connect(self) -> None:
        if self.alive:
            self.agent.hear(self.agent.connected, self)

    def welcome(self, generation: int, shadow: bool, returns: bool) -> None:
        """The agent has accepted this worker."""
        self.connected, self.shadow, self.returns = True, shadow, returns
        self.frozen, self.generation = generation, -1 if shadow else generation
        if returns:
            self._say(Protected(), True)
            self.waiting = Decision
            return
        if shadow:
            self.waiting = Decision
        else:
            self._say(Protected(), True)
            self._begin()

    def send(self, message: ToWorker) -> None:
        """From the agent."""
        control = isinstance(message, (Freeze, Hold))
        if not self.connected:
            return
        clock = self._world.clock
        self._down[control] = max(self._down[control], clock.now + self._world.draw_local())
        clock.at(self._down[control], self._take, message)

    def _say(self, message: FromWorker, control: bool) -> None:
        clock = self._world.clock
        self._up[control] = max(self._up[control], clock.now + self._world.draw_local())
        clock.at(self._up[control], self.agent.hear, self.agent.told, self, message)

    def drained(self) -> float:
        """When all that it has said has arrived."""
        return max(*self._up.values(), self._world.clock.now + self._world.draw_local())

    # ---- the listener

    def _take(self, message: ToWorker) -> None:
        if not self.alive:
            return
        if isinstance(message, Freeze):
            if not self._world.mutations.deaf or message.generation % 2:
                self.frozen = max(self.frozen, message.generation)
                answer = Frozen(message.generation, self.step, self.phase, not self.shadow, True)
                self._say(answer, True)
            return
        if not isinstance(message, Hold):  # no collective fails here
            self._votes.append(message)
            self._go_on()

    # ---- the main thread

    def _begin(self) -> None:
        self._attempts += 1
        self.waiting = None
        self._world.clock.after(self._world.draw_compute(), self._compute, self._attempts)

    def _compute(self, attempt: int) -> None:
        if not self.alive or attempt != self._attempts:
            return
        if self.frozen > self.generation:
            if self._world.random.random() < self._world.job.leaves:
                self._say(Left(self.frozen), True)
            self.waiting = Decision
        elif self.step == self._world.steps:
            if self._world.random.random() < self._world.leave_early:
                self._exit()
                return
            self._report(Stage.FINISHED, self.generation)
            self.waiting = Release
        else:
            self.phase = Phase.READY
            self._world.oracle.ready(self.run, self.rank, self.agent.seat, self.agent.name, self.generation)
            self._world.oracle.voted(self.run, self.rank, self.generation, self.step)
            self._report(Stage.READY, self.generation)
            self.waiting = Commit
        self._go_on()

    def _exit(self) -> None:
        self.alive = False
        self._world.clock.at(self.drained(), self.agent.hear, self.agent.exited, self, 0)

    def _go_on(self) -> None:
        while self._votes and self.waiting is not None:
            self._receive(self._votes.popleft())

    def _receive(self, message: ToWorker) -> None:
        current = self.frozen == self.generation
        if isinstance(message, Decision):
            if message.generation >= self.frozen:
                self._follow(message)
        elif isinstance(message, Commit):
            if (
                self.waiting is Commit
                and (message.generation, message.step) == (self.generation, self.step)
                and current
            ):
                self._apply(self.generation)
                self._begin()
        elif isinstance(message, Release):
            if self.waiting is Release and message.generation == self.generation:
                self._world.oracle.finished(self.run, self.rank, self.weights, self._world.steps)
                self._exit()
        elif self.decision is not None and message.generation == self.decision.generation:  # type: ignore[union-attr]
            self._recover(message, self.decision)

    def _apply(self, attempt: int) -> None:
        self._world.oracle.applied(self.run, self, self.step, attempt)
        self.weights.append(attempt)
        self.phase = Phase.COMPUTING
        if self.step == self._introduces:
            self._say(Replicas([[]], {"model": (0, 7)}), True)

    def _follow(self, decision: Decision) -> None:
        if self.doomed:
            raise Violation(f"rank {self.rank} has applied a void step and recovers with the others")
        self.decision = decision
        if self.returns and self.rank not in self._world.members(decision.pending):
            self.weights = list(self.agent.taken_up(self.rank, decision.step))
            if self.weights != self.run.steps[: decision.step] or self.step != decision.step:
                raise Violation(f"rank {self.rank} takes up {self.weights}, the job is at {self.run.steps}")
        if self.rank in self._world.members(decision.pending):
            self._arrive(decision)
            return
        if decision.step == self.step + 1:
            if self.phase is not Phase.READY:
                raise Violation(f"rank {self.rank} is to roll forward and was not ready")
            self._apply(self.generation)
        if decision.step != self.step:
            raise Violation(f"rank {self.rank} is at step {self.step}, the decision says {decision.step}")
        self.phase = Phase.COMPUTING
        if decision.resizes:
            self.agent.leave_behind(self.rank, decision.step, self.weights)
        published = Published(b"", bytes(g % 256 for g in self.weights))
        self._report(Stage.PUBLISHED, decision.generation, msgspec.msgpack.encode(published))
        self.waiting = Rebuild

    def _arrive(self, decision: Decision) -> None:
        if self.returns:
            self._report(Stage.ARRIVED, decision.generation)
            self.waiting = Restore
            return
        if not self.shadow:
            raise Violation(f"rank {self.rank} is whole, the decision says that it is a replacement")
        private = self.agent.private.get(self.rank)
        if private is None:
            self._say(Mismatch("its private state is lost"), True)
            return
        if private[1] not in (decision.step - 1, decision.step):
            raise Violation(
                f"rank {self.rank} has the private state of {private}, it goes on at {decision.step}"
            )
        self._report(Stage.ARRIVED, decision.generation)
        self.waiting = Restore

    def _recover(self, message: ToWorker, decision: Decision) -> None:
        if isinstance(message, Restore) and self.waiting is Restore:
            copies = set(message.publications.values())
            if len(copies) != 1:
                raise Violation(f"the sources of rank {self.rank} differ")
            self.weights = self.run.steps[: decision.step]
            if bytes(g % 256 for g in self.weights) != copies.pop():
                raise Violation(f"the sources of rank {self.rank} are not at the committed state")
            self._world.oracle.restored(self.run, self.rank, self.weights, decision.step)
            self._report(Stage.RESTORED, decision.generation)
            self.waiting = Rebuild
        elif isinstance(message, Rebuild) and self.waiting is Rebuild:
            self._report(Stage.REBUILT, decision.generation)
            self.waiting = Resume
        elif isinstance(message, Resume) and self.waiting is Resume:
            if self.returns:
                self._introduces = self.step + 1
            self.generation, self.shadow, self.decision = decision.generation, False, None
            self.returns = False
            if self.frozen > self.generation:
                self.waiting = Decision
            else:
                self._begin()

    def _report(self, stage: Stage, generation: int, payload: bytes = b"") -> None:
        self._say(Report(stage, generation, self.step, payload), False)
