"""The tree of many agents, as the coordinator sees it: who hangs on whom, and who should. See `branch`."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Tree"]


class Tree:
    """Of one term and one number of seats. The first ``fan_out`` of them hang on the coordinator.

    Attributes:
        parents: by seat, the seat it hangs on; seats that are not in it hang on the coordinator.
    """

    def __init__(self, seats: int, fan_out: int) -> None:
        self.parents: dict[int, int] = {}
        self.needed = seats > fan_out
        self._planned = {seat: seat // fan_out - 1 for seat in range(fan_out, seats)}

    def missing(self) -> Iterable[tuple[int, int]]:
        """Seats that should hang on another one and do not, with that one."""
        return [(seat, parent) for seat, parent in self._planned.items() if seat not in self.parents]

    def attached(self, seat: int, parent: int) -> bool:
        """A seat hangs on another one now; False: it should not."""
        if self._planned.get(seat) != parent:
            return False
        self.parents[seat] = parent
        return True

    def dissolve(self, seat: int) -> list[int]:
        """Its children hang on the coordinator again; they are returned."""
        children = [child for child, parent in self.parents.items() if parent == seat]
        for child in children:
            del self.parents[child]
        return children
