"""The control plane of one node: turns sockets, deaths and timers into events, and decisions into deeds.

One agent, so the coordinator lives here and its messages to agents are calls. All of it runs on the agent's one
thread. Nothing here waits: a worker that does not answer meets a deadline.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable

from checkpointless_elastic.agent.lifelines import Lifelines
from checkpointless_elastic.agent.links import Links
from checkpointless_elastic.agent.recoveries import Recoveries
from checkpointless_elastic.agent.runtime import EventLoop, Workforce
from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.coordinator import Coordinator, State
from checkpointless_elastic.protocol.events import (
    Action,
    Broadcast,
    Deadline,
    End,
    Event,
    ExitedEarly,
    LeftEarly,
    Lost,
    Opened,
    Overdue,
    Reached,
    Replace,
    Restart,
    Stop,
    Succeed,
    Unfit,
)
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Failed,
    Freeze,
    FromWorker,
    Frozen,
    Hello,
    Learned,
    Left,
    Message,
    Mismatch,
    Protected,
    Refused,
    Replicas,
    Report,
    Restore,
    Welcome,
    encode,
)
from checkpointless_elastic.protocol.node import Node
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.mirror import newest
from checkpointless_elastic.worker.private import in_loop, lifeline_path, slot_path

logger = logging.getLogger(__name__)

EXIT_LIMIT_S = 10.0
"""How long the end of a job waits for the exit of the worker that is to blame."""


def describe(status: int) -> str:
    """An exit status as the end of a sentence that starts with a rank."""
    import signal

    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class AgentControl:
    """See the module; implements runtime.ControlPlane. ``settings``: of the job."""

    serves_workers = True

    def __init__(self, settings: Config) -> None:
        self._settings = settings
        self._incarnations: dict[int, int] = {}
        self._tokens: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        self._known_lost: set[tuple[int, int]] = set()
        self._learned = False
        self._fresh = True
        self.generation = 0
        self._handlers: dict[type[Action], Callable[..., None]] = {
            Broadcast: self._broadcast,
            Replace: self._replace,
            End: self._end_worker,
            Restart: self._restart,
            Stop: self._stop,
            Succeed: self._succeed,
            Deadline: self._deadline,
            Opened: self._opened,
            Reached: self._reached,
        }

    def attach(self, loop: EventLoop, workers: Workforce) -> None:
        self._loop = loop
        self._workers = workers
        self._links = Links(os.path.join(workers.run_dir, "agent.sock"), loop, self._accept, self._take)
        self._lifelines = Lifelines(loop, self.lost)
        self._recoveries = Recoveries(self._settings.events, workers.log_dir, self._pids)

    def _begin(self) -> None:
        """A new set of workers starts: nothing of the one before it counts."""
        self._fresh = False
        ranks = frozenset(self._workers.ranks)
        settings = self._settings
        self._coordinator = Coordinator(
            ranks, settings.max_faults_per_step, self.generation, settings.mirror_every
        )
        self._node = Node(ranks, self.generation)
        self._gone: dict[int, int] = {}
        self._failed: dict[int, str] = {}
        self._replaced: set[int] = set()
        self._culprits: list[int] = []
        for rank in ranks:
            Slot.create(slot_path(self._workers.run_dir, rank))

    # ---- what the agent tells

    def started(self, rank: int, incarnation: int, pid: int, token: str) -> None:
        if self._fresh:
            self._begin()
        self._incarnations[rank] = incarnation
        self._tokens[rank] = token
        self._pids[rank] = pid
        if rank in self._replaced:
            self._recoveries.mark("forked", time.monotonic())
        self._links.retry()

    def lost(self, rank: int, incarnation: int) -> None:
        known = (rank, incarnation) in self._known_lost
        if known or self._incarnations.get(rank) != incarnation or self._coordinator.state is State.ENDED:
            return
        now = time.monotonic()
        self._links.drain(rank)
        slot = Slot.open(slot_path(self._workers.run_dir, rank))
        if self._coordinator.protected and (rank in self._failed or in_loop(slot) or self._recovering):
            self._lose(rank, "was lost", now)

    @property
    def _recovering(self) -> bool:
        return self._coordinator.state not in (State.RUNNING, State.ENDED)

    def _lose(self, rank: int, cause: str, seen: float) -> None:
        error = self._failed.pop(rank, "")
        cause = f"failed: {error}" if error else cause
        self._known_lost.add((rank, self._incarnations[rank]))
        self._recoveries.noticed(rank, cause, seen)
        mirrored = newest(self._workers.run_dir, rank) if self._settings.mirror_every else -1
        self._handle(Lost(rank, cause, error, mirrored))

    def exited(self, rank: int, incarnation: int, status: int) -> None:
        if self._incarnations.get(rank) != incarnation or (rank, incarnation) in self._known_lost:
            self._recoveries.explain(rank, describe(status))
            if rank in self._culprits:
                self._workers.fail(self._culprits)
            return
        self._gone[rank] = status
        if self._coordinator.state is State.ENDED:
            self._settle_end()
        elif status == 0 and not self._recovering:
            self._node.exited(rank)
            self._handle(ExitedEarly(rank))
            self._settle_end()
        else:
            self._lose(rank, describe(status), time.monotonic())

    def stopped(self) -> None:
        self._recoveries.close()
        self._lifelines.close()
        self._links.close()

    # ---- what workers say

    def _accept(self, hello: Hello) -> Message | None:
        if hello.rank not in self._workers.ranks:
            return Refused(f"rank {hello.rank} is not of this node.")
        if hello.incarnation > self._incarnations.get(hello.rank, -1):
            return None
        if hello.token != self._tokens[hello.rank] or hello.incarnation != self._incarnations[hello.rank]:
            return Refused(f"wrong token for incarnation {hello.incarnation} of rank {hello.rank}.")
        if hello.channel == "vote" and self._coordinator.decision is not None:
            self._loop.call_later(0.0, lambda: self._catch_up(hello.rank))
        if hello.channel == "control":
            path = lifeline_path(self._workers.run_dir, hello.rank, hello.incarnation)
            self._lifelines.follow(path, hello.rank, hello.incarnation, self._pids[hello.rank])
        shadow = hello.rank in self._replaced
        return Welcome(self._coordinator.generation, shadow, self._settings.mirror_every)

    def _catch_up(self, rank: int) -> None:
        if self._coordinator.decision is not None:
            self._links.send(rank, "vote", encode(self._coordinator.decision))

    def _take(self, rank: int, message: FromWorker) -> None:
        if isinstance(message, Report):
            tally = self._node.report(rank, message)
            if message.payload and message.stage.value == "restored":
                self._recoveries.restored(message.payload)
            if tally is not None:
                self._handle(tally)
        elif isinstance(message, Frozen):
            answers = self._node.frozen(rank, message)
            if answers is not None:
                self._handle(answers)
        else:
            self._take_other(rank, message)

    def _take_other(self, rank: int, message: FromWorker) -> None:
        if isinstance(message, Protected):
            self._coordinator.protect(rank)
        elif isinstance(message, Left):
            self._handle(LeftEarly(rank, message.generation))
        elif isinstance(message, Mismatch):
            self._handle(Unfit(rank, message.reason))
        elif isinstance(message, Failed):
            self._failed[rank] = message.error
            self._loop.call_later(0.0, functools.partial(self._leaves, rank, self._incarnations[rank]))
        elif isinstance(message, Replicas):
            self._compare(rank, message)
        elif isinstance(message, Learned) and not self._learned:
            self._learned = True
            self._workers.learn(message.modules)

    def _compare(self, rank: int, held: Replicas) -> None:
        differ = self._coordinator.compare(rank, held)
        exposed = self._coordinator.exposed()
        if differ:
            logger.warning(
                "A lost rank cannot be recovered live: %s. Leave it out of Run, make it equal, or name the ranks that "
                "share it with run.declare_replicas.",
                differ,
            )
        elif exposed and not self._settings.mirror_every:
            logger.warning(
                "%d of %d ranks hold state that no other rank holds (%s): the loss of one of them cannot be recovered "
                "live, that of %d at once of the others can. Train with more than one replica of each shard (a mesh "
                "with a replicate dimension), or set mirror_every.",
                len(exposed),
                len(self._workers.ranks),
                ", ".join(map(str, exposed)),
                self._coordinator.survivable(),
            )

    # ---- what the coordinator decides

    def _handle(self, event: Event) -> None:
        try:
            actions = self._coordinator.handle(event)
        except ProtocolError as error:
            logger.error("[generation %d] %s", self._coordinator.generation, error)
            actions = [Restart(4, f"the ranks do not agree: {error}")]
        for action in actions:
            self._handlers[type(action)](action)

    def _broadcast(self, action: Broadcast) -> None:
        message = action.message
        ranks: list[int] | dict[int, int] = self._incarnations
        if isinstance(message, Decision):
            self._node.decided(message)
        if isinstance(message, Restore):
            ranks = sorted(self._coordinator.pending)
        channel = "control" if isinstance(message, Freeze) else "vote"
        data = encode(message)
        for rank in ranks:
            self._links.send(rank, channel, data)
        if isinstance(message, Commit) and message.step == 0:
            self._recoveries.mark("committed", time.monotonic())

    def _replace(self, action: Replace) -> None:
        self._links.drain(action.rank)
        self._replaced.add(action.rank)
        self._gone.pop(action.rank, None)
        self._workers.replace(action.rank)

    def _end_worker(self, action: End) -> None:
        self._workers.kill(action.rank)

    def _opened(self, action: Opened) -> None:
        self.generation = action.generation
        self._node.opened(action.generation, action.lost)
        self._recoveries.opened(action.generation, action.lost, action.cause, time.monotonic())

    def _reached(self, action: Reached) -> None:
        self._recoveries.reached(action.point, action.details, time.monotonic())
        if action.point == "resumed":
            self._replaced = set()

    def _deadline(self, action: Deadline) -> None:
        seconds = getattr(self._settings, action.limit).total_seconds()
        self._loop.call_later(seconds, lambda: self._handle(Overdue(action.generation, action.state)))

    def _restart(self, action: Restart) -> None:
        generation = self._coordinator.generation + 1
        culprits = [rank for rank, status in self._gone.items() if status] or sorted(self._coordinator.lost)
        self._coordinator.state = State.ENDED
        step = self._coordinator.step
        self._recoveries.restarting(action.rung, action.reason, generation, step, time.monotonic())
        self.generation = generation
        self._fresh = self._workers.restart_all(f"rung {action.rung}: {action.reason}")
        if not self._fresh:  # a replacement that is being forked may still start
            self._recoveries.close()
            self._workers.fail(culprits)

    def _leaves(self, rank: int, incarnation: int) -> None:
        """A script has failed. Its process closes its connections now and ends later: peers must not wait for that."""
        known = (rank, incarnation) in self._known_lost or self._incarnations[rank] != incarnation
        if not known and self._coordinator.protected and self._coordinator.state is not State.ENDED:
            self._lose(rank, "was lost", time.monotonic())

    def _stop(self, action: Stop) -> None:
        logger.error("The job stops: %s", action.reason)
        self._culprits = list(action.ranks)
        if all(self._workers.has_ended(rank) for rank in action.ranks):
            self._workers.fail(self._culprits)
        else:  # its exit code is named in the summary
            self._loop.call_later(EXIT_LIMIT_S, lambda: self._workers.fail(self._culprits))

    def _succeed(self, action: Succeed) -> None:
        logger.info("All ranks have finished.")

    def _settle_end(self) -> None:
        if self._coordinator.state is not State.ENDED or not self._gone.keys() >= set(self._workers.ranks):
            bad = [rank for rank, status in self._gone.items() if status]
            if self._coordinator.state is State.ENDED and bad:
                self._workers.fail(bad)
            return
        bad = [rank for rank, status in self._gone.items() if status]
        if bad:
            self._workers.fail(bad)
        else:
            self._workers.succeed()
