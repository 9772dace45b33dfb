"""All elastic groups of a worker: made, voided at a loss, built again."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field

from torch._C._distributed_c10d import PrefixStore, Store

from checkpointless_elastic.errors import CheckpointlessError, RankLostError
from checkpointless_elastic.groups.elastic import ElasticProcessGroup
from checkpointless_elastic.groups.host import Host, Situation
from checkpointless_elastic.groups.issue import Engine
from checkpointless_elastic.groups.link import Link, retire
from checkpointless_elastic.groups.native import Attempt, connect
from checkpointless_elastic.groups.sockets import shut_down
from checkpointless_elastic.groups.spec import GroupSignature, GroupSpec, RebuildReport, Superseded
from checkpointless_elastic.groups.waiting import give_up_soon

__all__ = ["Registry"]

_LIMIT = 600.0
_PATIENCE = 2.0


@dataclass(eq=False)
class _Running:
    """A connection attempt under way.

    Attributes:
        attempt: what can be given up.
        ranks: whose loss ends it; None: that of any rank.
        outcome: native groups, or the error; the first item counts.
    """

    attempt: Attempt
    ranks: frozenset[int] | None = None
    outcome: queue.SimpleQueue[list[Link] | BaseException] = field(default_factory=queue.SimpleQueue)


class Registry:
    """The elastic groups of one worker process.

    Attributes:
        engine: what becomes of their collectives.
        aborts: how often `abort` was called; see `rebuild`.
    """

    def __init__(self, host: Host, *, shadow: bool, limit: float = _LIMIT) -> None:
        """`limit`: seconds that a rebuild waits for a member that does not come and is not reported lost."""
        self.engine = Engine(host, shadow=shadow)
        self.aborts = 0
        self._limit = limit
        self._lost: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._running: list[_Running] = []
        self._left_alone: list[threading.Thread] = []

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

        `store` stands under the group's own prefix. Raises RankLostError if a member is lost meanwhile.
        """
        link = Link(None, self.engine.generation, void=True)
        if not self.engine.shadow:
            self._recover_first(spec)
            link = self._connect_first(spec, store)
        group = ElasticProcessGroup(spec, store, self.engine, link)
        group.splitter = lambda part: self.create(part, PrefixStore(f"{part.name}/", store))
        with self._lock:
            self.engine.groups[spec.name] = group
        return group

    def _recover_first(self, spec: GroupSpec) -> None:
        while self._lost & set(spec.ranks):
            if self.engine.host.situation() is not Situation.OUTSIDE:
                raise RankLostError(
                    f"Group {spec.name} cannot be made: it has a lost rank among its members."
                )
            self.engine.host.recover_outside()

    def _connect_first(self, spec: GroupSpec, store: Store) -> Link:
        running = _Running(Attempt(self.engine.generation), frozenset(spec.ranks))
        with self._lock:
            self._running.append(running)
        try:
            return connect(spec, store, running.attempt)
        except Superseded as error:
            raise RankLostError(
                f"Group {spec.name} could not be made: one of its members was lost."
            ) from error
        except CheckpointlessError:
            raise
        except RuntimeError as error:
            if self.engine.host.wait_for_freeze() and self._lost & set(spec.ranks):
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
            links = [
                group.link for group in affected if group.link.native is not None and not group.link.void
            ]
            for link in links:
                link.void = True
                link.pin()
            for running in self._running:
                if running.ranks is None or running.ranks & ranks:
                    running.attempt.given_up.set()
                    running.outcome.put(
                        Superseded("The rebuild was given up: another rank was lost meanwhile.")
                    )
        self._end(links)
        return [group.spec.name for group in affected]

    def _end(self, links: list[Link]) -> None:
        own = frozenset().union(*(link.own for link in links))
        peers = frozenset().union(*(link.peers for link in links))
        if own or peers:
            shut_down(own, peers)
        for link in links:
            link.abort_device()
        give_up_soon([future for link in links for future in [*link.futures]])

    def rebuild(self, store: Store, generation: int, *, aborts: int | None = None) -> RebuildReport:
        """Gives every void group a new native group under the prefix of this generation; ends shadow.

        Main thread; blocks until all their members have come. Every member must rebuild the same groups. Raises
        `Superseded` at once if `abort` is called meanwhile, or was called since the caller read `aborts`; the native
        groups made so far are dropped.
        """
        started = time.monotonic()
        running = _Running(Attempt(generation, self._limit))
        with self._lock:
            if aborts is not None and aborts != self.aborts:
                raise Superseded("The rebuild was not begun: another rank was lost meanwhile.")
            groups = [group for group in self.engine.groups.values() if group.link.void]
            kept = [group.spec.name for group in self.engine.groups.values() if not group.link.void]
            self._running.append(running)
        running.attempt.places.update(self._places(groups))
        links = self._connect_all(running, groups, store)
        self._exchange(running, groups, links, generation)
        names = tuple(group.spec.name for group in groups)
        return RebuildReport(names, tuple(kept), time.monotonic() - started)

    def _places(self, groups: list[ElasticProcessGroup]) -> dict[str, tuple[int, int]]:
        places = {group.spec.name: self.engine.ledger.place(group.spec.name) for group in groups}
        return {name: place for name, place in places.items() if place is not None}

    def _connect_all(self, running: _Running, groups: list[ElasticProcessGroup], store: Store) -> list[Link]:
        """Connects in a helper thread, which is left alone if it is superseded.

        A store client serves one call at a time. While one left alone may still wait in the store, the next gets a
        client of its own; not always, since a new connection costs a name look-up that can take seconds.
        """
        self._left_alone = [thread for thread in self._left_alone if thread.is_alive()]
        client = store.clone() if self._left_alone and hasattr(store, "clone") else store
        arguments = (running, [group.spec for group in groups], client)
        thread = threading.Thread(
            target=_connect_in_turn, args=arguments, name="checkpointless-rebuild", daemon=True
        )
        thread.start()
        outcome = running.outcome.get()
        if isinstance(outcome, BaseException):
            with self._lock:
                self._running.remove(running)
            self._left_alone.append(thread)
            raise outcome
        return outcome

    def _exchange(
        self, running: _Running, groups: list[ElasticProcessGroup], links: list[Link], generation: int
    ) -> None:
        """Puts the new native groups in place, unless a loss was announced in the last moment."""
        engine = self.engine
        with self._lock:
            self._running.remove(running)
            superseded = running.attempt.given_up.is_set()
            old = links if superseded else [group.link for group in groups]
            if not superseded:
                for group, link in zip(groups, links, strict=True):
                    group.link = link
                engine.shadow, engine.generation, self._lost = False, generation, frozenset()
        retire([link for link in old if link.native is not None])
        if superseded:
            raise Superseded("The rebuild was given up: another rank was lost meanwhile.")
        engine.ledger.compare({group.spec.name: group.link.places for group in groups})
        engine.look()

    def settle(self) -> None:
        """Issues again what members behind this rank still need; see `owed`. Main thread; blocks until they have it.

        Called by the next collective in any case; a session calls it before it goes on without one.
        """
        self.engine.settle()

    def committed(self, calls: int) -> None:
        """So many replayable calls of the job are committed, or were skipped by a replacement: see `owed`."""
        self.engine.ledger.commit(calls)

    def issued(self) -> dict[str, int]:
        """By group: collectives outside of steps since the last committed call, for `catch_up` in a replacement."""
        return dict(self.engine.ledger.issued)

    def catch_up(self, issued: dict[str, int]) -> None:
        """A replacement stands where the lost rank stood, which had issued so many since the last committed call."""
        self.engine.ledger.catch_up(issued)

    def has_live_groups(self) -> bool:
        """Is there a group that no loss has made void? Any thread."""
        return any(not group.link.void for group in [*self.engine.groups.values()])

    def signature(self) -> list[GroupSignature]:
        """Every group in order of creation."""
        return [group.spec.signature for group in self.engine.groups.values()]


def _connect_in_turn(running: _Running, specs: list[GroupSpec], store: Store) -> None:
    """Body of the helper thread. All members have made these groups in the same order, so none waits in a ring."""
    attempt = running.attempt
    try:
        links = [
            connect(spec, PrefixStore(f"checkpointless/g{attempt.generation}/{spec.name}/", store), attempt)
            for spec in specs
        ]
        running.outcome.put(links)
    except CheckpointlessError as error:
        running.outcome.put(error)
    except BaseException as error:  # raised by the thread that waits for the outcome
        # A member that heard of a further loss first has closed its connections: the news will be here in a moment.
        attempt.given_up.wait(_PATIENCE)
        running.outcome.put(error)
