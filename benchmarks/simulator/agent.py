"""One agent's process: performs the acts of `Member` and `Station`, and keeps copies for the seat that it guards.

A model of the package's agent: what goes over sockets there is a call after a delay here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from checkpointless_elastic.protocol.acts import (
    Act,
    Ask,
    Dial,
    Fail,
    HangUp,
    Obey,
    Perform,
    Query,
    Transmit,
    Yield,
)
from checkpointless_elastic.protocol.between import (
    Between,
    Child,
    Done,
    EndRank,
    Halt,
    Join,
    Order,
    RankStarted,
    ReplaceRank,
    Reseated,
    RollCall,
    RunAgain,
    Seated,
    Spare,
    Standing,
    Turned,
)
from checkpointless_elastic.protocol.events import Deadline, Overdue
from checkpointless_elastic.protocol.member import Closed, Me, Member
from checkpointless_elastic.protocol.messages import (
    Commit,
    FromWorker,
    Message,
    Release,
    Report,
    Restore,
    Stage,
)
from checkpointless_elastic.protocol.requests import Took, Warm
from checkpointless_elastic.protocol.station import Station
from simulator.keeping import Keeping
from simulator.oracle import Run, Violation
from simulator.worker import Worker

if TYPE_CHECKING:
    from simulator.world import World

__all__ = ["Agent"]

LINGER_S = 5.0
"""How long the coordinator's process stays when the job has ended."""


class Agent(Keeping):
    """Implements network.Host.

    Attributes:
        private: by rank, the step and the generation of the newest private state on this node, as (generation, step).
        kept: the same of the ranks of the seat before this one.
        left: by place on this node, the step and the weights that workers have left behind for another number of ranks.
        verdict: how the job ended, as far as this agent knows.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.address = world, name, f"{name}:1"
        self.alive, self.answers, self.frozen, self.side = True, True, False, 0
        self.storeless = False  # cut off from the directory only
        self.seat = -1
        self.station: Station | None = None
        self.workers: dict[int, Worker] = {}
        self.private: dict[int, tuple[int, int]] = {}
        self.kept: dict[int, tuple[int, int]] = {}
        self.left: dict[int, tuple[int, list[int]]] = {}
        self.verdict = ""
        self._deadline: Deadline | None = None
        self.member = Member(
            Me(name, self.address, world.size), world.rules, self._standing, lambda: world.open_store(self)
        )
        self._guardian = ""
        self._run: Run | None = None
        self._copied_at = 0.0
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._acts: deque[Act] = deque()
        self._performing = False
        self._known: set[int] = set()  # accepted connections whose first message was a Join
        world.network.add(self, self.address)
        world.clock.after(0.0, self.hear, self._begin)

    @property
    def coordinates(self) -> bool:
        return self.member.board is not None

    def _standing(self) -> Standing | None:
        return self.station.standing() if self.station is not None else None

    # ---- what reaches this process

    def hear(self, do: Callable[..., None], *arguments: Any) -> None:
        """Everything that happens to it: later while it is stopped, never when it has gone."""
        if not self.alive:
            return
        if self.frozen:
            self._inbox.append((do, arguments))
        else:
            do(*arguments)

    def thaw(self) -> None:
        """It goes on after a pause."""
        self.frozen = False
        waiting, self._inbox = self._inbox, deque()
        for do, arguments in waiting:
            self.world.clock.after(0.0, self.hear, do, *arguments)

    def _begin(self) -> None:
        self._do(self.member.begin(self.world.clock.now))
        self._tick()

    def _tick(self) -> None:
        self.world.clock.after(self.world.rules.heartbeat, self.hear, self._tick)
        self._do(self.member.tick(self.world.clock.now))

    def opened(self, link: int) -> None:
        self.hear(self._opened, link)

    def _opened(self, link: int) -> None:
        self._do(self.member.opened(link, "", self.world.clock.now))

    def closed(self, link: int, why: Closed, reason: str) -> None:
        self.hear(self._closed, link, why, reason)

    def _closed(self, link: int, why: Closed, reason: str) -> None:
        if self.world.tell is not None:
            self.world.trace(f"{self.name} loses connection {link}: {why.value}")
        if link > 0 or link in self._known:
            self._do(self.member.closed(link, why, reason, self.world.clock.now))

    def received(self, link: int, message: Between) -> None:
        self.hear(self._received, link, message)

    def _received(self, link: int, message: Between) -> None:
        self.world.took(self, message)
        now = self.world.clock.now
        if link < 0 and link not in self._known and isinstance(message, (Join, Child)):
            self._known.add(link)
            self._do(self.member.opened(link, message.agent, now))
        if link > 0 and isinstance(message, Order):
            self.world.oracle.obeyed(self.name, message.term)
        self._do(self.member.received(link, message, now))
        if isinstance(message, Turned) and message.fenced and self.workers:
            raise Violation(f"{self.name} was fenced and its workers live")

    def answered(self, ask: Ask, answer: object) -> None:
        """The directory has answered; None: it has not, in time."""
        self.hear(self._answered, ask, answer)

    def _answered(self, ask: Ask, answer: Any) -> None:
        if self.world.tell is not None and ask.query is not Query.BEAT:
            self.world.trace(f"{self.name} asked the directory {ask.query.value} {ask.term or ''}: {answer}")
        it, now = self.member, self.world.clock.now
        if answer is None:
            self._do(it.store_failed(ask.query, "no answer", now))
        elif ask.query is Query.NEWEST:
            self._do(it.found(*answer, now))
        elif ask.query is Query.CLAIM:
            self._do(it.claimed(ask.term, answer, now))
        elif ask.query is Query.LAST_BEAT:
            self._do(it.last_beat(answer, now))
        elif ask.query is Query.GUARD:
            self._do(it.guarded(answer, now))
        elif ask.query is Query.BEAT:
            self._do(it.beaten(answer, now))

    # ---- acts

    def _do(self, acts: list[Act]) -> None:
        self._acts.extend(acts)
        if self._performing:
            return
        self._performing = True
        while self._acts and self.alive:
            self._perform(self._acts.popleft())
        self._performing = False

    def _perform(self, act: Act) -> None:
        world = self.world
        if isinstance(act, Transmit):
            world.sent(self, act.message)
            if self.alive:
                world.network.send(self, act.link, act.message)
        elif isinstance(act, Obey):
            world.obeys(self, act.message)
            self._obey(act.message)
        elif isinstance(act, Ask):
            world.directory.ask(self, act)
        elif isinstance(act, Dial):
            if world.tell is not None:
                world.trace(f"{self.name} dials {act.address}")
            world.network.dial(self, act.link, act.address)
        elif isinstance(act, HangUp):
            if world.tell is not None:
                world.trace(f"{self.name} hangs up {act.link}: {act.reason}")
            self._known.discard(act.link)
            world.network.hang_up(self, act.link)
        elif isinstance(act, Perform):
            world.performs(self, act.action)
            if isinstance(act.action, Deadline):
                overdue = Overdue(act.action.generation, act.action.state)
                self._deadline = act.action
                world.clock.after(
                    world.limits[act.action.limit], self.hear, self._overdue, act.action, overdue
                )
        elif isinstance(act, Yield):
            world.note(f"{self.name} gives up its seat: {act.reason}")
            self._leave_seat()
        elif isinstance(act, Fail):
            world.note(f"{self.name} fails: {act.reason}")
            self._finish(f"out: {act.reason}")

    def _overdue(self, deadline: Deadline, overdue: Overdue) -> None:
        if deadline is self._deadline:
            self._do(self.member.overdue(overdue, self.world.clock.now))

    def _report(self, message: Between | None) -> None:
        if message is not None:
            self._do(self.member.report(message, self.world.clock.now))

    # ---- orders

    def _obey(self, message: Message) -> None:
        station = self.station
        if isinstance(message, Seated):
            self._take_seat(message)
        elif isinstance(message, Spare):
            self.world.clock.after(self.world.draw_fork(), self.hear, self._report, Warm())
        elif isinstance(message, Done):
            self._finish("succeeded")
        elif isinstance(message, Halt):
            self._finish(f"failed: {message.reason}")
        elif station is None:
            return
        elif isinstance(message, ReplaceRank):
            station.replaced(message.rank, message.store)
            self._start(message.rank)
        elif isinstance(message, EndRank):
            self.world.clock.after(0.0, self.kill, message.rank)
        elif isinstance(message, Reseated):
            station.obey(message)
            if (self.seat + 1) % len(station.seat.bases) in message.addresses:
                self._guardian = station.guardian
                self._copy_all()
        elif isinstance(message, RollCall):
            self._report(station.present(message))
        elif isinstance(message, RunAgain):
            self._run_again(station, message)
        else:
            self._deliver(station, message)

    def _deliver(self, station: Station, message: Any) -> None:
        if not station.obey(message):
            return
        if isinstance(message, Commit) and message.step == station.seat.kept:
            self.left.clear()
        ranks = sorted(station.pending) if isinstance(message, Restore) else list(self.workers)
        for rank in ranks:
            if rank in self.workers:
                self.workers[rank].send(message)
        if isinstance(message, Release):
            self._report(station.ended())

    def _take_seat(self, seat: Seated) -> None:
        left = dict(self.left) if seat.kept >= 0 else {}
        if self.station is not None:
            self._leave_seat()
        self.left = left
        if seat.kept >= 0:
            self._report(Took(seat.generation))
        self.station = Station(seat)
        self.seat, self._guardian = seat.seat, seat.guardian
        oracle = self.world.oracle
        oracle.seated(seat.seat, seat.restarts, seat.generation, self.name)
        how = "after the agent that was lost" if seat.taken else "and starts its workers"
        self.world.note(f"{self.name} takes seat {seat.seat} in generation {seat.generation} {how}")
        self._run = oracle.run(seat.restarts, seat.store, seat.taken, seat.world, seat.kept)
        for rank, (generation, step) in self.kept.items():
            self._report(self.station.copied(rank, generation, step))
        if seat.taken and len(seat.bases) > 1:
            self._fetch(self.station)
        else:
            self._start_all()

    def _start_all(self) -> None:
        assert self.station is not None
        for rank in sorted(self.station.ranks):
            self._start(rank)

    def _start(self, rank: int) -> None:
        assert self._run is not None
        old = self.workers.get(rank)
        if old is not None:
            old.alive = False
        self.workers[rank] = Worker(self, rank, self._run)
        self._report(RankStarted(rank, self.world.next_pid()))

    def _end_all(self) -> None:
        for worker in self.workers.values():
            worker.alive = False
        self.workers.clear()

    def _leave_seat(self) -> None:
        self._end_all()
        self.station, self.seat, self._guardian = None, -1, ""
        self.private.clear()
        self.kept.clear()
        self.left.clear()

    def _run_again(self, station: Station, order: RunAgain) -> None:
        self._end_all()
        self.private.clear()
        self.kept = {rank: at for rank, at in self.kept.items() if at[0] >= order.generation}
        seat = msgspec.structs.replace(
            station.seat,
            store=order.store,
            generation=order.generation,
            restarts=order.restarts,
            taken=False,
            guardian=self._guardian,
            kept=order.kept,
        )
        self.station = None
        self._take_seat(seat)

    def _finish(self, verdict: str) -> None:
        self.verdict = verdict
        if not verdict.startswith("out"):
            self.world.note(f"{self.name} ends: {verdict}")
        self._end_all()
        if self.coordinates and not verdict.startswith("out"):
            self.world.directory.ask(self, Ask(Query.END, verdict=verdict))
            self.world.clock.after(LINGER_S, self.hear, self.exit)
        else:
            self.exit()

    def exit(self) -> None:
        """The process ends in good order."""
        self.world.ended(self)

    # ---- workers

    def connected(self, worker: Worker) -> None:
        """A worker has opened its channels."""
        station = self.station
        if station is None or self.workers.get(worker.rank) is not worker:
            return
        shadow = worker.rank in station.pending and not station.fresh
        worker.welcome(station.generation, shadow, station.fresh)
        if station.decision is not None:
            worker.send(station.decision)

    def told(self, worker: Worker, message: FromWorker) -> None:
        """A worker has said something."""
        if self.station is None or self.workers.get(worker.rank) is not worker:
            return
        if isinstance(message, Report) and message.stage is Stage.READY:
            self.private[worker.rank] = (message.generation, message.step)
            self._copy(worker.rank)
        self._report(self.station.said(worker.rank, message))

    def kill(self, rank: int) -> None:
        """A worker dies; what it had said before is heard first."""
        worker = self.workers.get(rank)
        if worker is not None and worker.alive:
            worker.alive = False
            self.world.killed_at_end |= worker.waiting is Release
            self.world.note(f"rank {rank} of {self.name} dies")
            self.world.clock.at(worker.drained(), self.hear, self.exited, worker, -9)

    def exited(self, worker: Worker, code: int) -> None:
        """A worker's process has ended."""
        station, rank = self.station, worker.rank
        if station is None or self.workers.get(rank) is not worker:
            return
        del self.workers[rank]
        station.gone[rank] = code
        if station.released:
            self._report(station.ended())
        elif station.stopped:
            return
        elif code == 0 and not station.recovering:
            self._report(station.exited(rank))
        else:
            self._report(station.lost(rank, "was lost", "", -1))
