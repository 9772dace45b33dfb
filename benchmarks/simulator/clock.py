"""Virtual time: calls in the order of their moments, ties in the order in which they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Attributes: ``now`` in seconds; ``events``: calls that were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._calls: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, moment: float, do: Callable[..., None], *arguments: Any) -> None:
        """Call then; at once if that moment has passed."""
        self._asked += 1
        heapq.heappush(self._calls, (max(moment, self.now), self._asked, do, arguments))

    def after(self, delay: float, do: Callable[..., None], *arguments: Any) -> None:
        """Call after this many seconds."""
        self.at(self.now + delay, do, *arguments)

    def step(self) -> bool:
        """Make the next call; False: there is none."""
        if not self._calls:
            return False
        self.now, _, do, arguments = heapq.heappop(self._calls)
        self.events += 1
        do(*arguments)
        return True
