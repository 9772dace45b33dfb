"""Attempts at connecting native groups, on threads that are left alone when an attempt is given up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch._C._distributed_c10d import PrefixStore, Store

from checkpointless_elastic.errors import CheckpointlessError
from checkpointless_elastic.groups.lazy import Lazy
from checkpointless_elastic.groups.link import Link
from checkpointless_elastic.groups.native import Attempt, connect, meet
from checkpointless_elastic.groups.spec import GroupSpec, Superseded

__all__ = ["Connector", "Running", "connect", "connect_briefly", "connect_in_turn", "connect_used", "used"]

_PATIENCE = 2.0
_T = TypeVar("_T")


@dataclass(eq=False)
class Running:
    """An attempt under way.

    Attributes:
        attempt: what can be given up.
        ranks: whose loss ends it; None: that of any rank.
        lazy: the lazy group that it connects.
        outcome: what came of it, or the error. The first item counts.
    """

    attempt: Attempt
    ranks: frozenset[int] | None = None
    lazy: Lazy | None = None
    outcome: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def give_up(self) -> None:
        """End it with `Superseded`. Any thread."""
        self.attempt.given_up.set()
        self.outcome.put(Superseded("The attempt was given up: another rank was lost meanwhile."))


class Connector:
    """Runs what may wait in the store or for peers, and knows which clients of the store are free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left_alone: list[tuple[Store | None, threading.Thread]] = []

    def client(self, store: Store) -> Store:
        """A client of the store that is free.

        One serves one call at a time, and a thread left alone may still wait in it. Not always a new one, since a new
        connection costs a name look-up that can take seconds.
        """
        with self._lock:
            self._left_alone = [(held, thread) for held, thread in self._left_alone if thread.is_alive()]
            busy = any(held is store for held, _ in self._left_alone)
        return store.clone() if busy and hasattr(store, "clone") else store

    def run(self, running: Running, client: Store | None, call: Callable[[], _T]) -> _T:
        """The result of a call that may use this client; raises its error, or `Superseded` once it is given up."""
        thread = threading.Thread(
            target=_helper, args=(running, call), name="checkpointless-rebuild", daemon=True
        )
        thread.start()
        outcome = running.outcome.get()
        if isinstance(outcome, BaseException):
            with self._lock:
                self._left_alone.append((client, thread))
            raise outcome
        result: _T = outcome
        return result

    def wait(self, limit: float) -> None:
        """Until no thread is left alone: one that comes back from native code as the process ends would abort it."""
        deadline = time.monotonic() + limit
        for _, thread in self._left_alone:
            thread.join(max(0.0, deadline - time.monotonic()))


def _helper(running: Running, call: Callable[[], Any]) -> None:
    """Body of the helper thread."""
    try:
        running.outcome.put(call())
    except CheckpointlessError as error:
        running.outcome.put(error)
    except BaseException as error:  # raised by the thread that waits for the outcome
        # A member that heard of a further loss first has closed its connections: the news will be here in a moment.
        running.attempt.given_up.wait(_PATIENCE)
        running.outcome.put(error)


def used(generation: int, spec: GroupSpec) -> str:
    """The key that says that a group is in use."""
    return f"checkpointless/used/g{generation}/{spec.name}"


def connect_used(attempt: Attempt, specs: list[GroupSpec], store: Store) -> list[Link | None]:
    """Connects the groups that some rank has reported as used; the keys stay, so all members see the same ones."""
    keys = [used(attempt.generation, spec) for spec in specs]
    if not keys or store.check(keys):
        return connect_in_turn(attempt, specs, store)
    wanted = [spec for spec, key in zip(specs, keys, strict=True) if store.check([key])]
    links = dict(zip((spec.name for spec in wanted), connect_in_turn(attempt, wanted, store), strict=True))
    return [links.get(spec.name) for spec in specs]


def connect_in_turn(attempt: Attempt, specs: list[GroupSpec], store: Store) -> list[Link | None]:
    """All members have made these groups in the same order, so none waits in a ring."""
    return [connect(spec, _place(attempt, spec, store), attempt) for spec in specs]


def connect_briefly(attempt: Attempt, spec: GroupSpec, store: Store) -> Link:
    """A group that a member may let go of at once: all are connected, so none finds its peer gone as it connects."""
    place = _place(attempt, spec, store)
    link = connect(spec, place, attempt)
    meet(spec, place, attempt, "connected")
    return link


def _place(attempt: Attempt, spec: GroupSpec, store: Store) -> Store:
    return PrefixStore(f"checkpointless/g{attempt.generation}/{spec.name}/", store)
