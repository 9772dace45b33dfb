"""Groups that a rebuild left unconnected, since nobody had used them lately: connected when a member uses one again.

That member says so in the store, in one sequence for the whole job. A thread of each rank that has such groups follows
the sequence and connects those of its own that are named, while its script goes on with what it does. So no member
waits for another's script to come to the same place, as none had to before the loss: a send between two of many
connects the group of all, and two groups that ranks use in different orders do not wait for each other in a ring.
"""

from __future__ import annotations

import logging
import threading
import time
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
_END = "end"
_NO_LIMIT = timedelta(days=365)
PATIENCE_S = 5.0
"""How long the news of a lost node may take after its store has closed the connection."""


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
        self._store: Store | None = None  # where the sequence is
        self._next = 0  # the first place of the sequence that this rank has not read
        self._thread: threading.Thread | None = None

    def put(self, groups: list[tuple[ElasticProcessGroup, Lazy]], store: Store) -> None:
        """These are lazy from now on, and no rank uses one before all have put theirs. Main thread; contacts nobody."""
        alive = {
            key: (group, lazy) for key, (group, lazy) in [*self._groups.items()] if not lazy.ended.is_set()
        }
        self._groups = alive | {lazy.key(group.spec.name): (group, lazy) for group, lazy in groups}
        if not groups:
            return
        if (
            store is not self._store
        ):  # in another store the sequence begins anew; the old one ends with its store
            self._store, self._next, self._thread = store, 0, None
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._follow, args=(store,), name="checkpointless-lazy", daemon=True
            )
            self._thread.start()

    def wake(self, group: str, lazy: Lazy, store: Store) -> None:
        """Blocks until the group is connected on this rank, or void. Any thread. Raises why it cannot be connected."""
        if not lazy.ended.is_set():
            threading.Thread(
                target=self._ask, args=(group, lazy, store), name="checkpointless-wake", daemon=True
            ).start()
        lazy.ended.wait()
        if lazy.error is not None:
            raise lazy.error

    def end(self) -> None:
        """No rank uses a group any more: the threads of all ranks end, by one last entry. Does not block."""
        if self._store is not None and self._thread is not None and self._thread.is_alive():
            threading.Thread(
                target=self._say_end, args=(self._store,), name="checkpointless-wake", daemon=True
            ).start()

    def _say_end(self, store: Store) -> None:
        try:
            wanted, place = PrefixStore(_PREFIX, self._free(store)), self._next
            while wanted.compare_set(str(place), "", _END).decode() != _END:
                place += 1
        except RuntimeError as error:
            _logger.debug("the sequence of lazy groups cannot be ended: %s", error)

    def _ask(self, group: str, lazy: Lazy, store: Store) -> None:
        """On a thread of its own, since a store whose host is gone may never answer."""
        try:
            key, wanted = lazy.key(group), PrefixStore(_PREFIX, store)
            if wanted.add(f"members/{key}", 1) == 1:
                place = self._next
                while wanted.compare_set(str(place), "", key).decode() != key:
                    place += 1
        except BaseException as error:  # raised by whoever uses the group
            _end_late([lazy], error)

    def _follow(self, store: Store) -> None:
        try:
            own = store.clone() if hasattr(store, "clone") else store
            while True:
                client = self._free(own)
                wanted, place = PrefixStore(_PREFIX, client), str(self._next)
                wanted.wait([place], _NO_LIMIT)
                if store is not self._store:
                    return
                key = wanted.get(place).decode()
                if key == _END:
                    return
                self._next += 1
                found = self._groups.pop(key, None)
                if found is not None:
                    self._connect(*found, client)
        except BaseException as error:
            _logger.debug("the sequence of lazy groups is not followed any more: %s", error)
            if store is self._store:
                _end_late([lazy for _, lazy in [*self._groups.values()]], error)


def _end_late(waiting: list[Lazy], error: BaseException) -> None:
    """The store is gone, most likely with its node: the news of that makes the groups void, and explains it better."""
    deadline = time.monotonic() + PATIENCE_S
    for lazy in waiting:
        if not lazy.ended.wait(max(0.0, deadline - time.monotonic())):
            lazy.error = error
            lazy.ended.set()
