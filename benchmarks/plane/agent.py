"""One agent whose workers are no processes: each answers at once what a worker in order would."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from checkpointless_elastic.agent.membership import Membership, Network
from checkpointless_elastic.agent.peers import Peer
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.protocol.acts import Act, Transmit, Word
from checkpointless_elastic.protocol.between import Beat, Between, ReplaceRank, Seated, Spare, Standing
from checkpointless_elastic.protocol.checks import Published
from checkpointless_elastic.protocol.events import Action, Reached
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    FromWorker,
    Frozen,
    Phase,
    Protected,
    Rebuild,
    Report,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.rules import Rules
from checkpointless_elastic.protocol.station import Station

__all__ = ["Agent", "Counted"]

PUBLICATION = msgspec.msgpack.encode(Published(b"", bytes(64)))
_BEAT = Beat.__name__.encode()


class Counted(Membership):
    """Counts the messages that this agent sends and takes, heartbeats apart.

    Attributes:
        messages: since it was set to 0.
    """

    messages = 0

    def _perform(self, act: Act) -> None:
        if isinstance(act, Transmit) and not isinstance(act.message, Beat):
            self.messages += 1
        super()._perform(act)

    def _take(self, peer: Peer, body: bytes) -> None:
        if (
            body[2 : 2 + len(_BEAT)] != _BEAT
        ):  # after the heads of the array and of its first string, the name
            self.messages += 1
        super()._take(peer, body)


class Agent:
    """Implements membership.Office. Times are of time.monotonic().

    Attributes:
        greeted: the coordinator has answered.
        seated, committed, resumed: when that was; 0.0: not since `clear`.
        reached: in the coordinator's agent, when a recovery came to a point.
    """

    run_dir = ""

    def __init__(
        self, loop: EventLoop, rules: Rules, network: Network, size: int, changed: Callable[[], None]
    ) -> None:
        self.greeted = False
        self.seated = self.committed = self.resumed = 0.0
        self.reached: dict[str, float] = {}
        self._changed = changed
        self._station: Station | None = None
        self._wards: list[int] = []
        self.membership = Counted(loop, rules, size, self, network)
        self.membership.begin()

    def clear(self) -> None:
        """Of a step, or of a recovery."""
        self.committed = self.resumed = 0.0
        self.reached = {}

    # ---- what is asked of it

    def ready(self) -> None:
        """All its workers are ready for the next step; copies of their private state are taken to be there."""
        station = self._present()
        self._all(lambda: Report(Stage.READY, station.generation, station.step))
        for rank in self._wards:
            self._report(station.copied(rank, station.generation, station.step))

    def lose(self) -> float:
        """Its first worker dies. When that was reported."""
        station = self._present()
        rank, now = min(station.ranks), time.monotonic()
        self._report(station.lost(rank, "was killed by SIGKILL", "", -1))
        return now

    def _present(self) -> Station:
        assert self._station is not None, "this agent has no seat"
        return self._station

    # ---- Office

    def keeps(self, rank: int, generation: int) -> bool:
        """See Office; there are no copies here."""
        return True

    def obey(self, message: Word) -> None:
        """See Office."""
        if isinstance(message, Spare):
            self.greeted = True
        elif isinstance(message, Seated):
            self._take_seat(message)
        elif isinstance(message, ReplaceRank):
            self._present().replaced(message.rank, message.store)
        elif isinstance(message, (Commit, Freeze, Decision, Restore, Rebuild, Resume)):
            self._present().obey(message)
            self._answer(message)
        self._changed()

    def _take_seat(self, seat: Seated) -> None:
        self._station = Station(seat)
        before, ends = (seat.seat - 1) % len(seat.bases), [*seat.bases[1:], seat.world]
        self._wards = list(range(seat.bases[before], ends[before]))
        self._all(Protected)
        self.seated = time.monotonic()

    def _answer(self, message: Commit | Freeze | Decision | Restore | Rebuild | Resume) -> None:
        station = self._present()
        generation, step, pending = station.generation, station.step, set(station.pending)
        if isinstance(message, Commit):
            self.committed = time.monotonic()
        elif isinstance(message, Freeze):
            lost = station.ranks & set(message.lost)
            self._all(lambda: Frozen(generation, step, Phase.COMPUTING, True, True), but=lost)
        elif isinstance(message, Decision):
            self._all(lambda: Report(Stage.PUBLISHED, generation, step, PUBLICATION), but=pending)
            self._all(lambda: Report(Stage.ARRIVED, generation, step), but=station.ranks - pending)
        elif isinstance(message, Restore):
            self._all(lambda: Report(Stage.RESTORED, generation, step), but=station.ranks - pending)
        elif isinstance(message, Rebuild):
            self._all(lambda: Report(Stage.REBUILT, generation, step))
        else:
            self.resumed = time.monotonic()

    def _all(self, message: Callable[[], FromWorker], but: set[int] | frozenset[int] = frozenset()) -> None:
        """Each of its workers says this."""
        for rank in sorted(self._present().ranks - but):
            self._report(self._present().said(rank, message()))

    def _report(self, message: Between | None) -> None:
        if message is not None:
            self.membership.report(message)

    def perform(self, action: Action) -> None:
        """See Office; there are no deadlines here."""
        if isinstance(action, Reached):
            self.reached[action.point] = time.monotonic()

    def heard(self, message: Between) -> None:
        """See Office."""

    def give_way(self, reason: str) -> None:
        """See Office."""
        raise RuntimeError(f"An agent lost its seat: {reason}.")

    def cannot_go_on(self, reason: str) -> None:
        """See Office."""
        raise RuntimeError(reason)

    def standing(self) -> Standing | None:
        """See Office."""
        return self._station.standing() if self._station is not None else None

    def open_store(self) -> str:
        """See Office; nobody meets there."""
        return "127.0.0.1:1"

    def copied(self, rank: int, generation: int, step: int) -> None:
        """See Office."""
