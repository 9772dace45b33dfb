"""All elastic groups of a worker: made, voided at a loss, built again."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d as c10d

from checkpointless_elastic.errors import CheckpointlessError, RankLostError
from checkpointless_elastic.groups import connecting
from checkpointless_elastic.groups.connecting import (
    Connector,
    Running,
    connect_briefly,
    connect_in_turn,
    connect_used,
    used,
)
from checkpointless_elastic.groups.elastic import ElasticProcessGroup
from checkpointless_elastic.groups.host import Host, Situation
from checkpointless_elastic.groups.issue import Engine
from checkpointless_elastic.groups.lazy import Lazy, Sleepers
from checkpointless_elastic.groups.link import Link, retire
from checkpointless_elastic.groups.native import Attempt
from checkpointless_elastic.groups.sockets import shut_down
from checkpointless_elastic.groups.spec import GroupSignature, GroupSpec, RebuildReport, Superseded
from checkpointless_elastic.groups.waiting import end_idle, give_up_soon

__all__ = ["Registry"]

_logger = logging.getLogger(__name__)
_LIMIT = 600.0
_LAST_LIMIT = 30.0
_T = TypeVar("_T")


class Registry:
    """The elastic groups of one worker process.

    Attributes:
        engine: what becomes of their collectives.
        aborts: how often `abort` was called; see `rebuild`.
        used: a group was asked for, so peers may have met this rank.
    """

    def __init__(self, host: Host, *, shadow: bool, limit: float = _LIMIT) -> None:
        """`limit`: seconds that a rebuild waits for a member that does not come and is not reported lost."""
        self.engine = Engine(host, shadow=shadow)
        self.engine.wake = self._wake
        self.aborts = 0
        self.used = False
        self._limit = limit
        self._lost: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._running: list[Running] = []
        self._apart: list[Running] = []
        self._beside: list[Link] = []
        self._newest = -1
        self._connector = Connector()
        self._client = self._connector.client
        self._sleepers = Sleepers(self._connect_lazy, self._client)
        self._store: Store | None = None

    def install(self) -> None:
        """Makes torch.distributed give elastic groups from now on, and DDP report the order of its buckets."""
        from checkpointless_elastic.groups import ddp, patch

        patch.install(self)
        ddp.install(self.engine)

    @property
    def shadow(self) -> bool:
        """No peer may be contacted: the first rebuild ends this."""
        return self.engine.shadow

    def create(self, spec: GroupSpec, store: Store) -> ElasticProcessGroup:
        """A group of live members, connected, or in shadow one without a native group. Blocks until they have come.

        `store` stands under the group's own prefix; after a recovery its members meet in the store of that. Raises
        RankLostError if a member is lost meanwhile.
        """
        self.used = True
        link = Link(None, self.engine.generation, void=True)
        if not self.engine.shadow:
            self._recover_first(spec)
            store = self._meeting_place(spec, store)
            link = self._connect_first(spec, store)
        group = ElasticProcessGroup(spec, store, self.engine, link)
        group.splitter = lambda part: self.create(part, PrefixStore(f"{part.name}/", store))
        with self._lock:
            self.engine.groups[spec.name] = group
        return group

    def _meeting_place(self, spec: GroupSpec, store: Store) -> Store:
        if self._store is None:
            return store
        prefix = f"checkpointless/made/g{self.engine.generation}/{spec.name}/"
        return PrefixStore(prefix, self._client(self._store))

    def _recover_first(self, spec: GroupSpec) -> None:
        while self._lost & set(spec.ranks):
            if self.engine.host.situation() is not Situation.OUTSIDE:
                raise RankLostError(
                    f"Group {spec.name} cannot be made: it has a lost rank among its members."
                )
            self.engine.host.recover_outside()

    def _connect_first(self, spec: GroupSpec, store: Store) -> Link:
        running = Running(Attempt(self.engine.generation), frozenset(spec.ranks))
        with self._lock:
            self._running.append(running)
        try:
            return connecting.connect(spec, store, running.attempt)
        except Superseded as error:
            raise RankLostError(
                f"Group {spec.name} could not be made: one of its members was lost."
            ) from error
        except CheckpointlessError:
            raise
        except RuntimeError as error:
            if self.engine.host.wait_for_loss(lambda: bool(self._lost & set(spec.ranks))):
                raise RankLostError(
                    f"Group {spec.name} could not be made: one of its members was lost."
                ) from error
            raise
        finally:
            with self._lock:
                self._running.remove(running)

    def abort(self, ranks: frozenset[int]) -> list[str]:
        """Voids every group with a member in `ranks` and ends its collectives. Returns the names of these groups.

        Any thread; does not block. May be called again with the same ranks. A caller that supersedes a recovery that
        was not completed names the ranks lost in that one too: some members may have rebuilt their groups, others not.
        """
        with self._lock:
            self.aborts += 1
            self._lost |= ranks
            affected = [group for group in [*self.engine.groups.values()] if ranks & set(group.spec.ranks)]
            for group in affected:
                lazy, group.link.lazy = group.link.lazy, None
                if lazy is not None:
                    lazy.ended.set()
            links = _void(group.link for group in affected)
            for running in self._running:
                if running.ranks is None or running.ranks & ranks:
                    running.give_up()
        self._end(links)
        return [group.spec.name for group in affected]

    def supersede(self, generation: int) -> None:
        """A newer generation is open: what is under way beside the groups for an older one ends. Any thread."""
        with self._lock:
            self._newest = max(self._newest, generation)
            for running in self._apart:
                if running.attempt.generation < self._newest:
                    running.give_up()
            links = _void(link for link in self._beside if link.generation < self._newest)
        self._end(links)

    def abandon(self) -> None:
        """The script is being left: all groups are void for good, and what is under way ends. Any thread."""
        self.engine.ending = True
        with self._lock:
            named = [group.spec.ranks for group in self.engine.groups.values()]
            named += [tuple(running.ranks or ()) for running in self._running]
        self.supersede(sys.maxsize)
        self.forget_lazy()
        self.abort(frozenset().union(*named))

    def forget_lazy(self) -> None:
        """The store in which lazy groups wait for their next use is lost: they are void. Any thread."""
        with self._lock:
            for group in self.engine.groups.values():
                lazy, group.link.lazy = group.link.lazy, None
                if lazy is not None:
                    lazy.ended.set()
            for running in self._running:
                if running.lazy is not None:
                    running.give_up()

    def apart(self, generation: int, store: Store | None, call: Callable[[], _T]) -> _T:
        """The result of a call that may wait for a store or for peers, made on a thread of its own.

        Raises its error, or `Superseded` as soon as a newer generation is open (`supersede`).
        """
        running = Running(Attempt(generation))
        with self._lock:
            if generation < self._newest:
                raise Superseded("A newer generation is open already.")
            self._apart.append(running)
        try:
            return self._connector.run(running, store, call)
        finally:
            with self._lock:
                self._apart.remove(running)

    def connect_beside(self, spec: GroupSpec, store: Store, generation: int) -> Link:
        """A native group that no script sees, for a transfer; `let_go` ends it. Blocks until all members have come.

        Raises `Superseded` as soon as a newer generation is open; from then on its operations end with a RuntimeError.
        """
        client = self._client(store)
        attempt = Attempt(generation, self._limit)
        link = self.apart(generation, client, lambda: connect_briefly(attempt, spec, client))
        with self._lock:
            superseded = generation < self._newest
            if not superseded:
                self._beside.append(link)
        if superseded:
            retire([link])
            raise Superseded("A newer generation was opened while a group for it was connected.")
        return link

    def let_go(self, link: Link, failed: bool = False) -> None:
        """The end of a group of `connect_beside`. `failed`: its operations may not have ended, and are ended."""
        with self._lock:
            self._beside.remove(link)
            links = _void([link] if failed else [])
        self._end(links)
        retire([link])

    def close(self) -> None:
        """The script has ended. Blocks, seldom: gloo may still look for a member that was lost as it connected."""
        self._connector.wait(_LAST_LIMIT)

    def _end(self, links: list[Link]) -> None:
        own = frozenset().union(*(link.own for link in links))
        peers = frozenset().union(*(link.peers for link in links))
        if own or peers:
            shut_down(own, peers)
        for link in links:
            link.abort_device()
        give_up_soon([future for link in links for future in [*link.futures]])

    def rebuild(
        self, store: Store, generation: int, *, aborts: int | None = None, moved: bool = False
    ) -> RebuildReport:
        """Gives every void group that is in use a new native group under the prefix of this generation; ends shadow.

        Those whose use no rank has reported are lazy: connected when a member uses one again. All ranks must have
        called `report_use` before. Main thread; blocks until all members of the others have come. Every member must
        rebuild the same groups. Raises `Superseded` at once if `abort` is called meanwhile, or was called since the
        caller read `aborts`; the native groups made so far are dropped. `moved`: see `report_use`.
        """
        started = time.monotonic()
        if moved:
            self._void_reported(store, generation)
        running = Running(Attempt(generation, self._limit))
        with self._lock:
            if aborts is not None and aborts != self.aborts:
                raise Superseded("The rebuild was not begun: another rank was lost meanwhile.")
            groups = [
                group for group in self.engine.groups.values() if group.link.void and group.link.lazy is None
            ]
            kept = [group.spec.name for group in self.engine.groups.values() if not group.link.void]
            self._running.append(running)
        running.attempt.places.update(self._places(groups))
        links = self._connect_all(running, groups, self._client(store), connect_used)
        lazy = self._exchange(running, groups, links, generation)
        self._store = store
        self._sleepers.put(lazy, store)
        names = tuple(group.spec.name for group, link in zip(groups, links, strict=True) if link is not None)
        left = tuple(group.spec.name for group in self.engine.groups.values() if group.link.lazy is not None)
        return RebuildReport(names, tuple(kept), left, time.monotonic() - started)

    def report_use(self, store: Store, generation: int, *, moved: bool = False, stale: int = -1) -> None:
        """Tells all ranks which groups this one has used lately: these are connected in the rebuild of `generation`.

        That is in the present or the last committed call, or in what may have to be repeated after a loss. Affected or
        not: more ranks may leave before the rebuild. Main thread; one or two round trips.

        `moved`: the store may be another one than before. Then lazy groups become void, and a group that is void on one
        member, or whose communicator of NCCL is of generation `stale` or older and so may need the store that is gone,
        is void on all: some may have connected a lazy group in the old store, others not.
        """
        engine = self.engine
        keys = [
            used(generation, group.spec)
            for group in engine.groups.values()
            if group.stamp >= engine.calls - 1 or engine.ledger.concerns(group.spec.name)
        ]
        if moved:
            self.forget_lazy()
            keys += [
                _voided(generation, group.spec)
                for group in engine.groups.values()
                if group.link.void or (group.link.device is not None and group.link.generation <= stale)
            ]
        if keys:
            client: Any = self._client(store)
            self.apart(generation, client, lambda: _write(client, keys))

    def _void_reported(self, store: Store, generation: int) -> None:
        """Before the rebuild in a store that may have moved: what is void on one member is void on all."""
        groups = [*self.engine.groups.values()]
        keys = [_voided(generation, group.spec) for group in groups]
        client = self._client(store)
        found = self.apart(generation, client, lambda: [client.check([key]) for key in keys])
        with self._lock:
            links = _void(group.link for group, there in zip(groups, found, strict=True) if there)
        self._end(links)

    def _wake(self, group: ElasticProcessGroup) -> None:
        """Has all members connect a lazy group, and waits for that. Any thread."""
        lazy = group.link.lazy
        if lazy is not None and self._store is not None:
            self._sleepers.wake(group.spec.name, lazy, self._client(self._store))

    def _connect_lazy(self, group: ElasticProcessGroup, lazy: Lazy, store: Store) -> None:
        """On the thread of the lazy groups. Only the loss of a member, or of the store, gives this up."""
        running = Running(Attempt(lazy.generation), frozenset(group.spec.ranks), lazy)
        with self._lock:
            if group.link.lazy is not lazy:
                return
            self._running.append(running)
        try:
            (link,) = self._connect_all(running, [group], store, connect_in_turn)
            self._take_over(running, group, link)
        except Superseded as error:
            _logger.debug("%s", error)
        except BaseException as error:  # raised by whoever uses the group
            lazy.error = error
        finally:
            lazy.ended.set()

    def _take_over(self, running: Running, group: ElasticProcessGroup, link: Link | None) -> None:
        with self._lock:
            self._running.remove(running)
            superseded = running.attempt.given_up.is_set()
            if not superseded and link is not None:
                group.link = link
        if superseded and link is not None:
            retire([link])

    def _places(self, groups: list[ElasticProcessGroup]) -> dict[str, tuple[int, int]]:
        places = {group.spec.name: self.engine.ledger.place(group.spec.name) for group in groups}
        return {name: place for name, place in places.items() if place is not None}

    def _connect_all(
        self, running: Running, groups: list[ElasticProcessGroup], client: Store, connect_them: _Body
    ) -> list[Link | None]:
        """Connects in a helper thread, which is left alone if it is superseded."""
        specs = [group.spec for group in groups]
        try:
            return self._connector.run(running, client, lambda: connect_them(running.attempt, specs, client))
        except BaseException:
            with self._lock:
                self._running.remove(running)
            raise

    def _exchange(
        self,
        running: Running,
        groups: list[ElasticProcessGroup],
        links: list[Link | None],
        generation: int,
    ) -> list[tuple[ElasticProcessGroup, Lazy]]:
        """Puts the new native groups in place, unless a loss was announced in the last moment. The lazy ones."""
        engine = self.engine
        lazy = [(group, Lazy(generation)) for group, link in zip(groups, links, strict=True) if link is None]
        made = {group: link for group, link in zip(groups, links, strict=True) if link is not None}
        with self._lock:
            self._running.remove(running)
            superseded = running.attempt.given_up.is_set()
            old = [*made.values()] if superseded else [group.link for group in groups]
            if not superseded:
                for group, link in made.items():
                    group.link = link
                for group, left in lazy:
                    group.link = Link(None, generation, void=True, lazy=left)
                engine.shadow, engine.generation, self._lost = False, generation, frozenset()
                engine.recovered_at = engine.calls
        retire([link for link in old if link.native is not None])
        if superseded:
            raise Superseded("The rebuild was given up: another rank was lost meanwhile.")
        engine.ledger.compare({group.spec.name: link.places for group, link in made.items()})
        engine.look()
        return lazy

    def settle(self) -> None:
        """Issues again what members behind this rank still need; see `owed`. Main thread; blocks until they have it.

        Called by the next collective in any case; a session calls it before it goes on without one.
        """
        self.engine.settle()

    def all_finished(self) -> None:
        """All ranks have finished their scripts: destroyed groups end, and threads that wait for a next use."""
        self._sleepers.end()
        end_idle()
        for group in [*self.engine.groups.values()]:
            if group not in c10d._world.pg_map and group.link.native is not None:
                group.shutdown()

    def committed(self, calls: int) -> None:
        """So many replayable calls of the job are committed, or were skipped by a replacement: see `owed`."""
        self.engine.calls = calls
        self.engine.ledger.commit(calls)

    def issued(self) -> dict[str, int]:
        """By group: collectives outside of steps since the last committed call, for `catch_up` in a replacement."""
        return dict(self.engine.ledger.issued)

    def catch_up(self, issued: dict[str, int], *, exact: bool) -> None:
        """A replacement stands where the lost rank stood, see `Ledger.catch_up`."""
        self.engine.ledger.catch_up(issued, exact)

    def has_live_groups(self) -> bool:
        """Is there a group that no loss has made void, connected or lazy? Any thread."""
        links = [group.link for group in [*self.engine.groups.values()]]
        return any(not link.void or link.lazy is not None for link in links)

    def signature(self) -> list[GroupSignature]:
        """Every group in order of creation."""
        return [group.spec.signature for group in self.engine.groups.values()]


_Body = Callable[[Attempt, list[GroupSpec], Store], list[Link | None]]


def _voided(generation: int, spec: GroupSpec) -> str:
    """The key that says that a group is void on some member."""
    return f"checkpointless/void/g{generation}/{spec.name}"


def _write(client: Any, keys: list[str]) -> None:
    client.multi_set(keys, ["1"] * len(keys))
    client.check(keys[:1])  # a write is not answered: once this is, the keys are there


def _void(links: Iterable[Link]) -> list[Link]:
    """Mark those that are connected; their operations are then to be ended. Under the registry's lock."""
    found = [link for link in links if link.native is not None and not link.void]
    for link in found:
        link.void_since, link.void = time.monotonic(), True
        for future in [*link.futures]:
            future.void = True
        link.pin()
    return found
