"""What must always hold (design, section 4); a broken rule raises Violation with what was seen.

A worker's weights are the list of the attempts that it applied: entry s is the generation in which step s was computed.
So a step that is lost, doubled, out of order, or not the same attempt on all ranks, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Oracle", "Run", "Violation"]


class Violation(AssertionError):
    """Raised when an invariant does not hold."""


class Doomed(Protocol):
    """A worker. ``doomed``: it may have applied what the others will not; it must never join them again."""

    rank: int
    doomed: bool

    def belongs(self) -> bool:
        """Does it live, and has its agent its seat?"""
        ...


@dataclass(eq=False)
class Run:
    """One run of the script. ``store``: where its workers first met; ``steps``: by step, its committed attempt.

    ``world``: number of ranks.
    """

    restarts: int
    store: str
    world: int
    steps: list[int] = field(default_factory=list)
    ready: dict[tuple[int, int], set[int]] = field(default_factory=dict)  # (generation, step) -> ranks
    last: dict[Doomed, None] = field(default_factory=dict)  # who has applied the newest step


class Oracle:
    """Watches one job."""

    def __init__(self) -> None:
        self.detection = 2.0
        self.runs: dict[int, Run] = {}
        self.commits = 0
        self._seats: dict[int, tuple[int, int, str]] = {}  # by seat: restarts, generation, agent
        self._terms: dict[str, int] = {}

    def run(self, restarts: int, store: str, taken: bool, world: int, kept: int = -1) -> Run:
        """The run that workers of a seat belong to. ``kept``: it goes on with the first steps of the run before."""
        known = self.runs.get(restarts)
        if known is None or not (taken or known.store == store):
            before = self.runs[restarts - 1].steps if kept >= 0 else []
            if len(before) < kept:
                raise Violation(
                    f"a run is to go on at step {kept}, and the one before has {len(before)} steps"
                )
            known = self.runs[restarts] = Run(restarts, store, world, before[: max(0, kept)])
        return known

    # ---- steps

    def ready(self, run: Run, rank: int, seat: int, agent: str, generation: int) -> None:
        """A rank is ready for the next step of its run."""
        self._own(run, seat, agent, generation, f"rank {rank} of {agent} is ready")

    def voted(self, run: Run, rank: int, generation: int, step: int) -> None:
        """A rank has said that it is ready."""
        run.ready.setdefault((generation, step), set()).add(rank)

    def applied(self, run: Run, worker: Doomed, step: int, attempt: int) -> None:
        """A rank applies a step that it computed in generation ``attempt``.

        A coordinator that is cut off may have committed a step that nobody else heard of; the others void it. Its own
        workers, or one that dies at once, are then alone with it.
        """
        if step < len(run.steps) and run.steps[step] != attempt:
            self._differs(run, worker, step, attempt)
        if step > len(run.steps):
            raise Violation(
                f"rank {worker.rank} applies step {step}, and step {len(run.steps)} was not committed"
            )
        if step == len(run.steps):
            self._first(run, step, attempt)
        if step == len(run.steps) - 1:
            run.last[worker] = None

    def _first(self, run: Run, step: int, attempt: int) -> None:
        missing = run.world - len(run.ready.get((attempt, step), ()))
        if missing:
            raise Violation(f"step {step} is applied in generation {attempt}; {missing} ranks were not ready")
        run.steps.append(attempt)
        run.last = {}
        for old in [key for key in run.ready if key[1] < step]:
            del run.ready[old]
        self.commits += 1

    def _differs(self, run: Run, worker: Doomed, step: int, attempt: int) -> None:
        known = run.steps[step]
        if attempt < known and not worker.belongs():
            worker.doomed = True
        elif step == len(run.steps) - 1 and attempt > known and not any(one.belongs() for one in run.last):
            for one in run.last:
                one.doomed = True
            run.steps.pop()
        else:
            raise Violation(
                f"rank {worker.rank} applies step {step} of generation {attempt}, others of {known}"
            )

    def restored(self, run: Run, rank: int, weights: list[int], step: int) -> None:
        """A replacement has its state."""
        if weights != run.steps[:step] or len(weights) != step:
            raise Violation(f"rank {rank} was restored to {weights}, the job is at {run.steps[:step]}")

    def finished(self, run: Run, rank: int, weights: list[int], steps: int) -> None:
        """A worker was released."""
        if weights != run.steps or len(weights) != steps:
            raise Violation(f"rank {rank} ends with {weights}, the job with {run.steps}, of {steps} steps")

    # ---- seats and terms

    def seated(self, seat: int, restarts: int, generation: int, agent: str) -> None:
        """An agent takes a seat."""
        self._seats[seat] = (restarts, generation, agent)

    def owns(self, restarts: int, seat: int, agent: str) -> bool:
        """Is the seat this agent's?"""
        owner = self._seats.get(seat, (restarts, 0, ""))
        return owner[0] == restarts and owner[2] == agent

    def _own(self, run: Run, seat: int, agent: str, generation: int, what: str) -> None:
        restarts, since, owner = self._seats[seat]
        if owner != agent and run.restarts == restarts and generation >= since:
            raise Violation(f"{what} in generation {generation}, and {owner} has its seat since {since}")

    def ordered(self, owner: str, sender: str, term: int) -> None:
        """An order was sent."""
        if owner != sender:
            raise Violation(f"{sender} gives orders in term {term}, which is {owner}'s")

    def gave_seat(self, sender: str, term: int, newest: int, since: float) -> None:
        """A seat was given away. ``since``: how long there has been a newer term, in seconds."""
        if newest > term and since > self.detection:
            raise Violation(
                f"{sender} gives seats away in term {term}, and term {newest} began {since:.1f} s ago"
            )

    def obeyed(self, agent: str, term: int) -> None:
        """An order was obeyed."""
        if term < self._terms.get(agent, 0):
            raise Violation(f"{agent} obeys term {term} after term {self._terms[agent]}")
        self._terms[agent] = term
