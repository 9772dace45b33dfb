"""The two runs of a command: one that nobody disturbs, and one that is struck."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from checkpointless_elastic.chaos.job import (
    ChaosError,
    Job,
    StuckError,
    flips_obstacle,
    is_up,
    moved,
    steps,
    training,
)
from checkpointless_elastic.chaos.plan import Fault
from checkpointless_elastic.chaos.processes import Agent, Process, holds_store
from checkpointless_elastic.chaos.strikes import KINDS
from checkpointless_elastic.observe.records import Recovery

__all__ = ["Limits", "Oracle", "Outcome", "Trial", "calm"]

LOOK_S = 0.05
FOUND = "other bytes than its replicas"
"""What the record of a recovery says where a rank was replaced for its state."""
SLOWER = 5.0
"""So many times as long as in the run without faults the rest of the job may take."""


@dataclass(frozen=True)
class Oracle:
    """What is known of the run without faults.

    Attributes:
        seconds: from the first step, or the first moment with all workers, to the end.
        ranks: workers.
        spares: agents without workers.
        steps: that all ranks had committed when they were last looked at; 0 if the script has no Run.
        flips: why a flipped bit of a rank's memory would not be put right, as a clause; empty if it would.
    """

    seconds: float
    ranks: int
    spares: int
    steps: int
    flips: str = "the run without faults did not say whether it would be found"

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps if self.steps else 0.0

    def save(self, folder: Path) -> None:
        (folder / "oracle.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Oracle:
        """Raises ChaosError if the folder is not that of a run without faults."""
        try:
            return cls(**json.loads((folder / "oracle.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ChaosError(
                f"{folder} is not the oracle of an earlier run: {error}; give the folder oracle/ of a --keep."
            ) from error


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Attributes:
        stop: how long a fault lasts that passes.
        patience: how long a recovery may take, and the end of the job beyond its usual time.
    """

    stop: float
    patience: float


@dataclass
class Outcome:
    """What one fault did.

    Attributes:
        moment: seconds after the first step; None if it did not come to pass.
        who: "rank 3" or "agent 0".
        recovery: the record of how it was answered, if it was.
        seconds: until all ranks had gone on; None when that was not seen.
    """

    fault: Fault
    moment: float | None = None
    who: str = ""
    recovery: Recovery | None = None
    seconds: float | None = None

    @property
    def struck(self) -> bool:
        return self.moment is not None

    @property
    def found(self) -> bool:
        """Whether the job did not overlook it: something that is silent must be named as what it is."""
        silent = KINDS[self.fault.kind].silent
        return not silent or (self.recovery is not None and FOUND in self.recovery.cause)


def calm(command: Sequence[str], folder: Path) -> Oracle:
    """Runs the command to its end. Raises ChaosError when it fails or starts no workers under our agent."""
    up: float | None = None
    first: float | None = None
    ranks = spares = done = 0
    flips = Oracle.flips
    with Job(command, folder) as job:
        while job.running():
            found, now = job.agents(), time.monotonic()
            workers = sum(len(agent.workers) for agent in found)
            if is_up(found) and workers >= ranks:  # agents come and go one after the other
                up, ranks, spares = up or now, workers, sum(not agent.workers for agent in found)
            done = max(done, steps(found))
            first = first or (now if done > 0 else None)
            flips = flips_obstacle(found, flips)
            time.sleep(LOOK_S)
        end = time.monotonic()
        if job.code:
            raise ChaosError(f"Without faults the command ends with exit code {job.code}:\n{job.tail()}")
    if up is None:
        raise ChaosError(
            f"No worker of an agent of checkpointless_elastic was seen: the command must start torchrun with "
            f"--rdzv-backend checkpointless. Its output:\n{job.tail()}"
        )
    oracle = Oracle(end - (first or up), ranks, spares, done, flips)
    oracle.save(folder)
    return oracle


class Trial:
    """The struck run.

    Attributes:
        outcomes: one for each fault.
        stuck: what the job did not do in time; empty if it ended by itself.
    """

    def __init__(self, job: Job, oracle: Oracle, limits: Limits, say: Callable[[str], None]) -> None:
        self.outcomes: list[Outcome] = []
        self.stuck = ""
        self._job, self._oracle, self._limits, self._say = job, oracle, limits, say
        self._begun = self._lost = 0.0
        self._nodes: list[Agent] = []
        self._chosen: Process | None = None

    def run(self, faults: Sequence[Fault]) -> None:
        """Strikes with one fault after the other, each once the one before is over, and waits for the end."""
        self.outcomes = [Outcome(fault) for fault in faults]
        try:
            self._strike_all()
            self._job.until(lambda: False, self._rest, "the job did not end after the last fault")
        except StuckError as error:
            self.stuck = str(error)
        for outcome in filter(lambda outcome: outcome.struck, self.outcomes):
            outcome.recovery = outcome.recovery or self._answer(outcome)

    def _strike_all(self) -> None:
        if not self._job.until(self._has_begun, self._limits.patience, "there was no first step"):
            return
        self._begun = time.time()
        for outcome in self.outcomes:
            if not self._job.until(
                partial(self._is_due, outcome.fault), self._rest, "the job made no progress"
            ):
                return
            time.sleep(outcome.fault.late * self._oracle.step_seconds)
            ready = partial(self._choose, outcome)
            if self._job.until(
                ready, self._limits.patience, f"there was no process for {outcome.fault.kind}"
            ):
                self._strike(outcome)
                self._say(f"{outcome.fault.number + 1}/{len(self.outcomes)} {sentence(outcome)}")

    def _has_begun(self) -> bool:
        self._nodes = self._job.agents()
        return steps(self._nodes) >= 0 if self._oracle.steps else is_up(self._nodes)

    def _is_due(self, fault: Fault) -> bool:
        """Whether its part of the job is done: of the steps, or of the time."""
        if self._oracle.steps:
            return steps(self._nodes) >= fault.part * self._oracle.steps
        return time.time() - self._begun - self._lost >= fault.part * self._oracle.seconds

    @property
    def _rest(self) -> float:
        """How long all that is left may take."""
        return self._limits.patience + SLOWER * self._oracle.seconds

    def _strike(self, outcome: Outcome) -> None:
        """Does it, and waits until the job has gone on."""
        kind, at = outcome.fault.kind, time.time()
        outcome.moment = at - self._begun
        assert self._chosen is not None
        with self._chosen as process:
            limit = self._limits.patience if KINDS[kind].silent else self._limits.stop
            if not KINDS[kind].strike(process, limit):
                outcome.moment = None
                return
            ready = partial(self._has_gone_on, outcome, process, time.time())
            if self._job.until(
                ready, self._limits.patience, f"the job did not go on after {kind} of {outcome.who}"
            ):
                answer = outcome.recovery
                outcome.seconds = (answer.time + answer.seconds if answer else time.time()) - at
                self._lost += outcome.seconds

    def _has_gone_on(self, outcome: Outcome, process: Process, over: float) -> bool:
        """Whether a recovery has ended, or all ranks have computed since the fault was over and nobody was lost."""
        outcome.recovery = self._answer(outcome)
        if outcome.recovery:
            return True
        if not self._oracle.steps:  # a recovery ends with a step
            return is_up(self._job.agents())
        return not process.ended(0) and moved(self._nodes, over)

    def _choose(self, outcome: Outcome) -> bool:
        """Opens the process to strike, once it is there."""
        self._nodes = found = self._job.agents()
        target = outcome.fault.target
        kind = KINDS[outcome.fault.kind]
        if kind.agent:
            places = [agent.pid for agent in found if agent.workers]
            if kind.spare:
                has_spare = len(places) < len(found)
                places = [pid for pid in places if has_spare and not holds_store(pid)]
            outcome.who = f"agent {target % max(len(places), 1)}"
            pid = places[target % len(places)] if places else 0
        else:
            homes = [agent for agent in found if target in agent.workers]
            outcome.who = f"rank {target}"
            pid = homes[0].workers[target] if homes and self._may_die(homes[0], target) else 0
        try:
            self._chosen = Process(pid) if pid else None
        except ProcessLookupError:
            self._chosen = None
        return self._chosen is not None

    def _may_die(self, agent: Agent, rank: int) -> bool:
        """Not at the end of the script: when the others have ended too, nobody could bring it back."""
        return not self._oracle.steps or training(agent, rank)

    def _answer(self, outcome: Outcome) -> Recovery | None:
        """The first recovery that ended after the fault, of a loss before the job had gone on."""
        at = self._begun + (outcome.moment or 0.0)
        before = at + outcome.seconds if outcome.seconds is not None else float("inf")
        return next((r for r in self._job.recoveries() if r.time + r.seconds > at and r.time < before), None)


def sentence(outcome: Outcome) -> str:
    """What a fault did, in a line."""
    head = f"{outcome.fault.kind} of {outcome.who} after {outcome.moment:.1f} s"
    if outcome.seconds is None:
        return f"{head}: the job has ended since"
    how = f"rung {outcome.recovery.rung}" if outcome.recovery else "nobody was lost"
    return f"{head}: {how}, {outcome.seconds:.2f} s"
