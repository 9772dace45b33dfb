"""Byte strings by number, each kept as long as somebody uses it.

A rank's private state names a dozen random states of 10 kB. Most of them differ in nothing or in one part, so a state
is made of the numbers of its parts, and a part is written to the slot once.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Iterable, Mapping

__all__ = ["Parts"]


class Parts:
    """The parts of this process. Main thread only.

    Numbers start at the time of first use, so that a replacement never gives one that the rank it replaces has given.

    Attributes:
        held: all parts by number.
    """

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self._uses: dict[int, int] = {}
        self._next: itertools.count[int] | None = None

    def take(self, part: bytes) -> int:
        """One more use of this part: its number, the same for equal parts."""
        number = self._numbers.get(part)
        if number is None:
            self._next = self._next or itertools.count(time.time_ns())
            number = next(self._next)
            self._add(number, part)
        self._uses[number] += 1
        return number

    def adopt(self, number: int, found: Mapping[int, bytes]) -> None:
        """One more use of a part of another rank. KeyError if it is neither here nor there."""
        if number not in self.held:
            self._add(number, found[number])
        self._uses[number] += 1

    def release(self, numbers: Iterable[int]) -> None:
        """One use less of each."""
        for number in numbers:
            self._uses[number] -= 1
            if not self._uses[number]:
                del self._uses[number]
                part = self.held.pop(number)
                if self._numbers.get(part) == number:
                    del self._numbers[part]

    def release_with(self, owner: object, numbers: tuple[int, ...]) -> None:
        """One use less of each when `owner` is gone."""
        weakref.finalize(owner, self.release, numbers).atexit = False

    def _add(self, number: int, part: bytes) -> None:
        self.held[number] = part
        self._uses[number] = 0
        self._numbers.setdefault(part, number)
