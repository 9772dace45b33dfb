"""Which agents lose their workers again and again: the one that stands out is excluded from the job.

The rule: within the last `WINDOW` committed steps it has lost so many workers, and no other agent as many. A fault that
comes with the script or its data strikes all nodes alike, and excludes none.
"""

from __future__ import annotations

from collections import deque

__all__ = ["WINDOW", "Losses"]

WINDOW = 100
"""Committed steps for which a loss counts."""


class Losses:
    """Of one coordinator; the next one begins anew. ``limit``: losses that are too many, 0: there is no limit.

    Attributes:
        commits: steps that were committed, those of earlier runs of the script counted.
    """

    def __init__(self, limit: int) -> None:
        self.commits = 0
        self._limit = limit
        self._lost: deque[tuple[int, str]] = deque()  # at which number of commits, and whose

    def note(self, agent: str) -> None:
        """This agent has lost a worker."""
        self._lost.append((self.commits, agent))

    def forget(self, agent: str) -> None:
        """This agent has left."""
        self._lost = deque((at, name) for at, name in self._lost if name != agent)

    def worst(self) -> tuple[str, int]:
        """The agent that is to be excluded, and its losses; '' and 0: none is."""
        while self._lost and self._lost[0][0] <= self.commits - WINDOW:
            self._lost.popleft()
        counts: dict[str, int] = {}
        for _, agent in self._lost:
            counts[agent] = counts.get(agent, 0) + 1
        most = max(counts.values(), default=0)
        worst = [agent for agent, count in counts.items() if count == most]
        return (worst[0], most) if 0 < self._limit <= most and len(worst) == 1 else ("", 0)
