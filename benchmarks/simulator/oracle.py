"""What must always hold (design, section 4); a broken rule raises Violation with what was seen.

A worker's weights are the list of the attempts that it applied: entry s is the generation in which step s was computed.
So a step that is lost, doubled, out of order, or not the same attempt on all ranks, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Oracle", "Run", "Violation"]


class Violation(AssertionError):
    """Raised when an invariant does not hold."""


@dataclass(eq=False)
class Run:
    """One run of the script. ``store``: where its workers first met; ``steps``: by step, its committed attempt."""

    restarts: int
    store: str
    steps: list[int] = field(default_factory=list)
    ready: dict[tuple[int, int], set[int]] = field(default_factory=dict)  # (generation, step) -> ranks


class Oracle:
    """Watches one job. ``world``: number of ranks."""

    def __init__(self) -> None:
        self.world = 0
        self.runs: dict[int, Run] = {}
        self.commits = 0
        self._seats: dict[int, tuple[int, int, str]] = {}  # by seat: restarts, generation, agent
        self._terms: dict[str, int] = {}

    def run(self, restarts: int, store: str, taken: bool) -> Run:
        """The run that workers of a seat belong to."""
        known = self.runs.get(restarts)
        if known is None or not (taken or known.store == store):
            known = self.runs[restarts] = Run(restarts, store)
        return known

    # ---- steps

    def ready(self, run: Run, rank: int, seat: int, agent: str, generation: int) -> None:
        """A rank is ready for the next step of its run."""
        self._own(run, seat, agent, generation, f"rank {rank} of {agent} is ready")

    def voted(self, run: Run, rank: int, generation: int, step: int) -> None:
        """A rank has said that it is ready."""
        run.ready.setdefault((generation, step), set()).add(rank)

    def applied(self, run: Run, rank: int, step: int, attempt: int) -> None:
        """A rank applies a step that it computed in generation ``attempt``."""
        if step < len(run.steps):
            if run.steps[step] != attempt:
                raise Violation(
                    f"rank {rank} applies step {step} as computed in generation {attempt}, others {run.steps[step]}"
                )
            return
        if step > len(run.steps):
            raise Violation(f"rank {rank} applies step {step}, and step {len(run.steps)} was not committed")
        missing = self.world - len(run.ready.get((attempt, step), ()))
        if missing:
            raise Violation(f"step {step} is applied in generation {attempt}; {missing} ranks were not ready")
        run.ready.clear()
        run.steps.append(attempt)
        self.commits += 1

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

    def _own(self, run: Run, seat: int, agent: str, generation: int, what: str) -> None:
        restarts, since, owner = self._seats[seat]
        if owner != agent and run.restarts == restarts and generation >= since:
            raise Violation(f"{what} in generation {generation}, and {owner} has its seat since {since}")

    def ordered(self, owner: str, sender: str, term: int) -> None:
        """An order was sent."""
        if owner != sender:
            raise Violation(f"{sender} gives orders in term {term}, which is {owner}'s")

    def obeyed(self, agent: str, term: int) -> None:
        """An order was obeyed."""
        if term < self._terms.get(agent, 0):
            raise Violation(f"{agent} obeys term {term} after term {self._terms[agent]}")
        self._terms[agent] = term
