"""Byte strings by number, each kept as long as somebody uses it.

A rank's private state names a dozen random states of 10 kB. Most of them differ in nothing or in one part, so a state
is made of the numbers of its parts, and a part is written to the slot once.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import deque
from collections.abc import Mapping

__all__ = ["Parts"]


class Parts:
    """The parts of this process. Main thread only, but for the end of an owner, which may come on any thread.

    Numbers start at the time of first use, so that a replacement never gives one that the rank it replaces has given.

    Attributes:
        held: all parts by number.
    """

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self._uses: dict[int, int] = {}
        self._next: itertools.count[int] | None = None
        self._gone: deque[tuple[int, ...]] = deque()

    def take(self, part: bytes) -> int:
        """One more use of this part: its number, the same for equal parts."""
        self.settle()
        number = self._numbers.get(part)
        if number is None:
            self._next = self._next or itertools.count(time.time_ns())
            number = next(self._next)
            self._add(number, part)
        self._uses[number] += 1
        return number

    def adopt(self, number: int, found: Mapping[int, bytes]) -> None:
        """One more use of a part of another rank. KeyError if it is neither here nor there."""
        self.settle()
        if number not in self.held:
            self._add(number, found[number])
        self._uses[number] += 1

    def release_with(self, owner: object, numbers: tuple[int, ...]) -> None:
        """One use less of each when `owner` is gone."""
        weakref.finalize(owner, self._gone.append, numbers).atexit = False

    def settle(self) -> None:
        """Let go of what owners that are gone have used."""
        while self._gone:
            for number in self._gone.popleft():
                self._release(number)

    def _release(self, number: int) -> None:
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._uses[number]
            part = self.held.pop(number)
            if self._numbers.get(part) == number:
                del self._numbers[part]

    def _add(self, number: int, part: bytes) -> None:
        self.held[number] = part
        self._uses[number] = 0
        self._numbers.setdefault(part, number)
