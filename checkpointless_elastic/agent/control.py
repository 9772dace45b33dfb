"""The control plane of one node: sockets, deaths and timers become messages, the coordinator's words become deeds.

All of it runs on the agent's one thread. Nothing here waits: a worker that does not answer meets a deadline. What other
agents must know goes through `Membership`, to the coordinator in this agent or in another one.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable

from checkpointless_elastic import run_dir
from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.chair import Chair
from checkpointless_elastic.agent.failing import Failing
from checkpointless_elastic.agent.hangs import Hangs
from checkpointless_elastic.agent.health import Health
from checkpointless_elastic.agent.lifelines import Lifelines
from checkpointless_elastic.agent.links import Links
from checkpointless_elastic.agent.membership import Membership, Network
from checkpointless_elastic.agent.recoveries import Recoveries, describe
from checkpointless_elastic.agent.runtime import EventLoop, Workforce
from checkpointless_elastic.agent.tenant import Tenant
from checkpointless_elastic.agent.wards import PuttingBack, Wards
from checkpointless_elastic.config import Config
from checkpointless_elastic.protocol.acts import Word
from checkpointless_elastic.protocol.between import (
    Between,
    Done,
    EndRank,
    Halt,
    Ordered,
    RankExplained,
    RankStarted,
    ReplaceRank,
    Reseated,
    RollCall,
    RunAgain,
    Seated,
    Spare,
    Standing,
)
from checkpointless_elastic.protocol.checks import next_due
from checkpointless_elastic.protocol.events import Action
from checkpointless_elastic.protocol.guarding import Kept
from checkpointless_elastic.protocol.messages import (
    Afresh,
    Commit,
    Decision,
    Explained,
    Failed,
    Freeze,
    FromWorker,
    Hello,
    Hold,
    Learned,
    Message,
    Mismatch,
    Refused,
    Release,
    Restore,
    Unhealthy,
    Unwound,
    Welcome,
    encode,
)
from checkpointless_elastic.protocol.requests import Dismissed, Took, Warm
from checkpointless_elastic.protocol.rules import Rules
from checkpointless_elastic.protocol.station import Station
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.ballot import Ballot, ballot_path
from checkpointless_elastic.worker.mirror import newest
from checkpointless_elastic.worker.private import in_loop, lifeline_path, slot_path

logger = logging.getLogger(__name__)


class AgentControl(Tenant):
    """See the module; implements runtime.ControlPlane and membership.Office.

    ``settings``, ``rules``: of the job. ``open_store``: see `protocol.board`. ``network``: None for one node.

    Attributes:
        seat: this agent's, once `await_seat` has returned True.
    """

    serves_workers = True
    seat: Seated

    def __init__(
        self,
        settings: Config,
        rules: Rules,
        open_store: Callable[[], str],
        network: Callable[[], Network] | None = None,
    ) -> None:
        self._settings, self._rules, self._network = settings, rules, network
        self.open_store = open_store
        self._incarnations: dict[int, int] = {}
        self._tokens: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        self._condemned: dict[int, str] = {}  # workers that are being ended, and why
        self._known_lost: set[tuple[int, int]] = set()
        self._failed: dict[int, str] = {}
        self._learned = False
        self._offered: Seated | None = None
        self._running = False  # workers of a seat may live: no other seat can be taken before they have ended
        self._deferred: list[Word] = []  # words about the seat that is taken then
        self._station: Station | None = None
        self._ballot: Ballot | None = None
        self._wards: Wards | None = None

    def attach(self, loop: EventLoop, workers: Workforce, size: int) -> None:
        """See ControlPlane; from here on this agent takes part. ``size``: workers of this node."""
        self._loop = loop
        self._workers = workers
        self.run_dir = workers.run_dir
        path = os.path.join(workers.run_dir, "agent.sock")
        self._links = Links(path, loop, self._accept, self._take, self._condemn)
        self._lifelines = Lifelines(loop, self.lost)
        self._bell = Bell(loop)
        self._failing = Failing(loop, workers)
        self._hangs = Hangs(loop, self._settings, self._pids, self.tell, self._report)
        self._recoveries = Recoveries(self._settings.events, workers.log_dir, self._pids)
        network = self._network() if self._network is not None else None
        self._membership = Membership(loop, self._rules, size, self, network)
        self._chair = Chair(loop, self._settings, self._rules, self._recoveries, self._membership)
        self._health = Health(
            loop, self._bell, self._settings.health_check, lambda: [self.run_dir, workers.log_dir()]
        )
        self._if_fit(self._membership.begin)

    def await_seat(self) -> bool:
        """Serve the loop until workers are to be started, those of `seat`; False: the job has ended before."""
        self._running = False
        deferred, self._deferred = self._deferred, []
        for message in deferred:
            self.obey(message)
        self._loop.run(lambda: self._offered is not None or bool(self._workers.ended))
        if self._offered is None:
            return False
        self.seat, self._offered, self._running = self._offered, None, True
        return True

    @property
    def generation(self) -> int:
        """See ControlPlane."""
        return self._station.generation if self._station is not None else 0

    # ---- a seat

    def _take_seat(self, seat: Seated) -> None:
        if seat.kept >= 0:
            self._report(Took(seat.generation))
        self._renumber(seat)
        self._ballot = None
        self._station = station = Station(seat, self._voted)
        self._wards = self._membership.take_seat(
            seat,
            station.ranks,
            lambda kept: self._fetched(seat, station, kept),
            lambda rank, report: self._report(station.said(rank, report)),
        )
        self._failed, self._condemned = {}, {}
        self._failing.begin()
        if not seat.taken:
            self._lay_out(seat)
            self._offer(seat)
        elif self._wards is None:
            self._fetched(seat, station, Kept([]))

    def _lay_out(self, seat: Seated) -> None:
        """The files of its ranks."""
        assert self._station is not None
        run_dir.empty(self.run_dir, kept=seat.kept >= 0)
        for rank in self._station.ranks:
            Slot.create(slot_path(self.run_dir, rank)).close()
        self._ballot = Ballot.create(ballot_path(self.run_dir), seat.world)
        self._hangs.begin(self.run_dir, self._station)

    def _offer(self, seat: Seated) -> None:
        if seat.taken or seat.restarts:
            self._if_fit(lambda: self._start(seat))
        else:  # it was found to be fit when it came
            self._start(seat)

    def _start(self, seat: Seated) -> None:
        self._offered = seat

    def _fetched(self, seat: Seated, station: Station, kept: Kept) -> None:
        """The guardian has sent what it kept of the lost agent's ranks."""
        if self._station is not station:
            return
        self._lay_out(seat)
        back = PuttingBack(self.run_dir, kept.copies)
        self._bell.aside(back.run, lambda: self._offer(seat) if self._station is station else None)
        station.recall(kept.held)
        missing = sorted(station.ranks - {copy.rank for copy in kept.copies})
        if missing:
            reason = "its private state was lost with its node and its guardian's"
            self._report(station.said(missing[0], Mismatch(reason)))

    def keeps(self, rank: int, generation: int) -> bool:
        """See Office."""
        return self._station is None or self._station.keeps(rank, generation)

    def copied(self, rank: int, generation: int, step: int) -> None:
        """See Office."""
        if self._station is not None:
            self._report(self._station.copied(rank, generation, step))

    def standing(self) -> Standing | None:
        """See Office."""
        return self._station.standing() if self._station is not None else None

    def _voted(self) -> int:
        return self._ballot.committed() if self._ballot is not None else 0

    def _report(self, message: Between | None) -> None:
        if message is None:
            return
        counted = self._station.counted() if self._station is not None else None
        if counted is not None:
            self._membership.report(counted)
        self._membership.report(message)

    # ---- what the agent tells

    def started(self, rank: int, incarnation: int, pid: int, token: str) -> None:
        self._incarnations[rank] = incarnation
        self._condemned.pop(rank, None)  # that was the one before
        self._tokens[rank] = token
        self._pids[rank] = pid
        self._links.drain(rank)  # of the incarnation before
        self._membership.report(RankStarted(rank, pid))
        self._links.retry()

    def lost(self, rank: int, incarnation: int) -> None:
        station = self._station
        known = (rank, incarnation) in self._known_lost
        if known or self._incarnations.get(rank) != incarnation or station is None:
            return
        if station.stopped or station.released:
            return  # its exit status counts now
        self._links.drain(rank)
        with Slot.open(slot_path(self.run_dir, rank)) as slot:
            runs = in_loop(slot)
        if station.is_protected(rank) and (rank in self._failed or runs or station.recovering):
            self._lose(rank, "was lost")

    def _lose(self, rank: int, cause: str) -> None:
        assert self._station is not None
        error = self._failed.pop(rank, "")
        cause = self._condemned.pop(rank, f"failed: {error}" if error else cause)
        self._known_lost.add((rank, self._incarnations[rank]))
        mirrored = newest(self.run_dir, rank) if self._rules.mirror_every else -1
        self._report(self._station.lost(rank, cause, error, mirrored))

    def exited(self, rank: int, incarnation: int, status: int) -> None:
        station = self._station
        if self._incarnations.get(rank) != incarnation or (rank, incarnation) in self._known_lost:
            self._report(RankExplained(rank, describe(status)))
            self._failing.exited(rank)
            return
        if station is None:
            return
        station.gone[rank] = status
        if station.released:
            self._report(station.ended())
        elif station.stopped:
            self._failing.exited(rank)
        elif status == 0 and not station.recovering:
            self._report(station.exited(rank))
        else:
            self._lose(rank, describe(status))

    def will_end(self, cause: str) -> None:
        """See ControlPlane."""
        self._membership.leave(cause)

    def leave(self) -> None:
        """See ControlPlane."""
        if self._station is not None:
            self._station.stopped = True
        self._membership.close("")

    def stopped(self) -> None:
        self._membership.close(self._workers.ended)
        self._recoveries.end()
        self._health.close()
        self._lifelines.close()
        self._bell.close()
        self._links.close()

    # ---- what workers say

    def _accept(self, hello: Hello) -> Message | None:
        station = self._station
        if station is None or hello.rank not in station.ranks:
            return Refused(f"rank {hello.rank} is not of this node.")
        if hello.incarnation > self._incarnations.get(hello.rank, -1):
            return None
        if hello.token != self._tokens[hello.rank] or hello.incarnation != self._incarnations[hello.rank]:
            return Refused(f"wrong token for incarnation {hello.incarnation} of rank {hello.rank}.")
        if hello.channel == "vote" and station.decision is not None:
            self._loop.call_later(0.0, lambda: self._catch_up(hello.rank))
        if hello.channel == "control":
            path = lifeline_path(self.run_dir, hello.rank, hello.incarnation)
            self._lifelines.follow(path, hello.rank, hello.incarnation, self._pids[hello.rank])
        shadow = hello.rank in station.pending and not station.fresh
        return Welcome(
            station.generation,
            shadow,
            self._rules.mirror_every,
            tuple(station.seat.bases),
            station.store if shadow else "",
            self._settings.verify_every,
            station.fresh,
        )

    def tell(self, rank: int, message: Message) -> bool:
        """See ControlPlane."""
        return self._links.send(rank, "control", encode(message))

    def _catch_up(self, rank: int) -> None:
        if self._station is not None and self._station.decision is not None:
            self._links.send(rank, "vote", encode(self._station.decision))

    def _take(self, rank: int, message: FromWorker) -> None:
        station = self._station
        if station is None:
            return
        if isinstance(message, (Unwound, Afresh)):
            self._workers.answered(rank, message)
        elif isinstance(message, Failed):
            self._failed[rank] = message.error
            self._loop.call_later(0.0, functools.partial(self._leaves, rank, self._incarnations[rank]))
        elif isinstance(message, Explained):
            self._hangs.answered(rank, message)
        elif isinstance(message, Unhealthy):
            self._unfit(message.reason)
        elif isinstance(message, Learned):
            if not self._learned:
                self._learned = True
                self._workers.learn(message.modules)
        elif self._wards is None or not self._wards.heard(rank, message):
            self._report(station.said(rank, message))

    def _leaves(self, rank: int, incarnation: int) -> None:
        """A script has failed. Its process closes its connections now and ends later: peers must not wait for that."""
        known = (rank, incarnation) in self._known_lost or self._incarnations[rank] != incarnation
        station = self._station
        over = station is None or station.stopped or station.released
        if station is not None and not known and not over and station.is_protected(rank):
            self._lose(rank, "was lost")

    def _condemn(self, rank: int, reason: str, stuck: bool = False) -> None:
        """End a worker."""
        if rank in self._condemned:
            return
        self._condemned[rank] = reason
        if stuck:
            self._hangs.ended(rank, reason)
        self._workers.kill(rank)

    # ---- what the coordinator says

    def obey(self, message: Word) -> None:
        """See Office."""
        if isinstance(message, Spare):
            if message.bases:
                logger.info("[term %d] this agent waits as a spare", message.term)
                self._workers.when_warm(lambda: self._report(Warm()))
        elif isinstance(message, Dismissed):
            self._dismissed(message)
        elif self._deferred and not isinstance(message, (Done, Halt)):
            self._deferred.append(message)
        elif isinstance(message, Seated):
            self._seated(message)
        elif isinstance(message, Done):
            self._workers.succeed()
        elif isinstance(message, Halt):
            self._failing.halt(message, self._station)
        elif self._station is not None:
            self._obey(self._station, message)

    def _obey(self, station: Station, message: Word) -> None:
        if isinstance(message, ReplaceRank):
            self._replace(station, message)
        elif isinstance(message, EndRank):
            self._condemn(message.rank, message.reason, message.stuck)
        elif isinstance(message, Reseated):
            self._reseated(station, message)
        elif isinstance(message, RollCall):
            self._report(station.present(message))
        elif isinstance(message, RunAgain):
            self._run_again(station, message)
        elif not isinstance(message, (Seated, Spare, Done, Halt, Dismissed)):
            self._deliver(station, message)

    def _deliver(self, station: Station, message: Ordered) -> None:
        """For this node's workers."""
        if isinstance(message, Decision) and self._ballot is not None:
            self._ballot.end()
        if not station.obey(message):
            return
        self._membership.ordered(message)
        if isinstance(message, Commit) and self._ballot is not None and self._rules.max_nodes == 1:
            self._ballot.begin(next_due(message.step, self._settings.verify_every))
        ranks = sorted(station.pending if isinstance(message, Restore) else station.ranks)
        channel = "control" if isinstance(message, (Freeze, Hold)) else "vote"
        data = encode(message)
        for rank in ranks:
            self._links.send(rank, channel, data)
        if isinstance(message, Commit) and message.step == station.seat.kept:
            run_dir.forget_kept(self.run_dir)
        if isinstance(message, Commit) and message.step == 0:
            self._recoveries.mark("committed", time.monotonic())
        if isinstance(message, Release):
            self._report(station.ended())

    def _replace(self, station: Station, message: ReplaceRank) -> None:
        self._links.drain(message.rank)
        station.replaced(message.rank, message.store)
        self._if_fit(lambda: self._workers.replace(message.rank))

    def _reseated(self, station: Station, message: Reseated) -> None:
        """The guardian of this seat may be another agent now."""
        station.obey(message)
        if self._wards is not None and (station.seat.seat + 1) % len(station.seat.bases) in message.addresses:
            self._wards.move(station.guardian)

    def cannot_go_on(self, reason: str) -> None:
        """See Office."""
        self._failing.cannot_go_on(reason)

    # ---- the coordinator's own agent

    def perform(self, action: Action) -> None:
        """See Office."""
        self._chair.perform(action)

    def heard(self, message: Between) -> None:
        """See Office."""
        self._chair.heard(message)
