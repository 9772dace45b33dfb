"""Which ranks are slow: what others wait for in every step, without anybody being stuck.

A rank's *own* time is what it needs by itself in one step: for its data, and from the start of the call to its first
collective. From there on all ranks go at the pace of the slowest. It is an average over some steps, made by the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from statistics import median

__all__ = ["Paces"]

MUCH = 0.2
"""A rank is slow if its own time is above the median by this part of a step."""
REPORTS = 3
"""So many reports one after the other must say so."""


class Paces:
    """Own times of all ranks, as their agents report them from time to time.

    Attributes:
        slow: by rank, seconds by which its own time is above the median.
    """

    def __init__(self) -> None:
        self.slow: dict[int, float] = {}
        self._latest: dict[int, tuple[float, float]] = {}
        self._times: dict[int, int] = {}  # how often each rank was found slow, without a break

    def heard(self, ranks: Mapping[int, tuple[float, float]], expected: Set[int]) -> list[str]:
        """Own time and time of a step, in seconds, of some ranks.

        Gives sentences about ranks that are slow from now on, or no more. ``expected``: all ranks; nothing is said
        before they are there.
        """
        self._latest.update(ranks)
        if not expected <= self._latest.keys():
            return []
        latest, self._latest = {rank: self._latest[rank] for rank in expected}, {}
        usual = median(own for own, _ in latest.values())
        step = median(whole for _, whole in latest.values())
        return [
            sentence
            for rank in sorted(latest)
            if (sentence := self._judge(rank, latest[rank][0], usual, step))
        ]

    def _judge(self, rank: int, own: float, usual: float, step: float) -> str:
        if own - usual <= MUCH * step:
            self._times.pop(rank, None)
            return "" if self.slow.pop(rank, None) is None else f"Rank {rank} is as fast as the others again."
        self._times[rank] = self._times.get(rank, 0) + 1
        known = rank in self.slow
        if self._times[rank] >= REPORTS:
            self.slow[rank] = own - usual
        if known or rank not in self.slow:
            return ""
        return (
            f"Rank {rank} is slow: it needs {own * 1e3:.0f} ms of its own in each step, the median is "
            f"{usual * 1e3:.0f} ms, and all others wait for it. With a spare, `checkpointless drain` moves the ranks "
            f"of its node."
        )
