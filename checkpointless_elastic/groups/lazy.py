"""Groups that a rebuild left unconnected, since nobody had used them lately: connected when a member uses one again.

That member says so in the store, in one sequence for the whole job. A thread of each rank that has such groups follows
the sequence and connects those of its own that are named, while its script goes on with what it does. So no member
waits for another's script to come to the same place, as none had to before the loss: a send between two of many
connects the group of all, and two groups that ranks use in different orders do not wait for each other in a ring.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from checkpointless_elastic.groups.elastic import ElasticProcessGroup

__all__ = ["Lazy", "Sleepers"]

_logger = logging.getLogger(__name__)
_PREFIX = "checkpointless/wanted/"
_NO_LIMIT = timedelta(days=365)


@dataclass(eq=False)
class Lazy:
    """What stands in the link of a group that waits for its next use.

    Attributes:
        generation: of the rebuild that left it so; its members meet under the prefix of this one.
        ended: set when it is connected, or void because a member was lost, or cannot be connected.
        error: why it cannot be connected.
    """

    generation: int
    ended: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def key(self, group: str) -> str:
        """How the sequence names it; another loss makes it another one."""
        return f"{self.generation}/{group}"


class Sleepers:
    """The lazy groups of this rank, and the thread that connects them."""

    def __init__(
        self,
        connect: Callable[[ElasticProcessGroup, Lazy, Store], None],
        free: Callable[[Store], Store],
    ) -> None:
        """`connect`: connects one group and sets `ended`. `free`: the store client, or another if it is busy."""
        self._connect = connect
        self._free = free
        self._groups: dict[str, tuple[ElasticProcessGroup, Lazy]] = {}
        self._next = 0  # the first place of the sequence that this rank has not read
        self._thread: threading.Thread | None = None

    def put(self, groups: list[tuple[ElasticProcessGroup, Lazy]], store: Store) -> None:
        """These are lazy from now on, and no rank uses one before all have put theirs. Main thread; contacts nobody."""
        alive = {
            key: (group, lazy) for key, (group, lazy) in [*self._groups.items()] if not lazy.ended.is_set()
        }
        self._groups = alive | {lazy.key(group.spec.name): (group, lazy) for group, lazy in groups}
        if groups and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(
                target=self._follow, args=(store,), name="checkpointless-lazy", daemon=True
            )
            self._thread.start()

    def wake(self, group: str, lazy: Lazy, store: Store) -> None:
        """Blocks until the group is connected on this rank, or void. Any thread. Raises why it cannot be connected."""
        key, wanted = lazy.key(group), PrefixStore(_PREFIX, store)
        if not lazy.ended.is_set() and wanted.add(f"members/{key}", 1) == 1:
            place = self._next
            while wanted.compare_set(str(place), "", key).decode() != key:
                place += 1
        lazy.ended.wait()
        if lazy.error is not None:
            raise lazy.error

    def _follow(self, store: Store) -> None:
        try:
            own = store.clone() if hasattr(store, "clone") else store
            while True:
                client = self._free(own)
                wanted, place = PrefixStore(_PREFIX, client), str(self._next)
                wanted.wait([place], _NO_LIMIT)
                key = wanted.get(place).decode()
                self._next += 1
                found = self._groups.pop(key, None)
                if found is not None:
                    self._connect(*found, client)
        except BaseException as error:  # raised by whoever uses one of the groups
            _logger.debug("lazy groups are not connected any more: %s", error)
            for _, lazy in [*self._groups.values()]:
                lazy.error = error
                lazy.ended.set()
