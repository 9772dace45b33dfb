"""This worker's membership of the job: what it knows of generations and steps, and its talk with the agent.

Two threads. The *main thread* computes, votes at the gate and takes part in recoveries, at points where nothing of a
step is under way (sync points): the end of a void attempt, the start of a replayable call, a collective outside of
them, the end of the script. The *listener* takes a Freeze at any moment: under the lock it notes the generation, so
that no vote can commit any more, answers where this rank stands, and aborts the affected groups.

One Session per process; `current()` gives it, None when this process does not run under the agent.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch

from checkpointless_elastic.agent.preload import third_party, worth_learning
from checkpointless_elastic.data.cursor import Cursor, Frame, Outside
from checkpointless_elastic.groups.host import LoggedCollective, Situation, is_apart
from checkpointless_elastic.groups.registry import Registry
from checkpointless_elastic.protocol.hangs import Activity
from checkpointless_elastic.protocol.messages import (
    Again,
    Commit,
    Decision,
    Explain,
    Freeze,
    Frozen,
    Hold,
    Learned,
    Left,
    Mismatch,
    Phase,
    Protected,
    Rebuild,
    Release,
    Replicas,
    Report,
    Restore,
    Stage,
    ToWorker,
    Unhealthy,
    Unwind,
)
from checkpointless_elastic.protocol.messages import Resume as Resumed
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker import lifeline
from checkpointless_elastic.worker.ballot import Ballot, ballot_path
from checkpointless_elastic.worker.channel import Channel
from checkpointless_elastic.worker.exchange import expect
from checkpointless_elastic.worker.private import lifeline_path, slot_path
from checkpointless_elastic.worker.pulse import Pulse, pulse_path
from checkpointless_elastic.worker.startup_log import StartupLog
from checkpointless_elastic.worker.whereabouts import explain

if TYPE_CHECKING:
    from checkpointless_elastic.data.resume import Resume
    from checkpointless_elastic.worker.recovery import Recovery

logger = logging.getLogger(__name__)

GRACE_S = 0.5
"""How long a collective that failed waits for the agent to name a lost rank. The kernel closes a dead process's
sockets a moment before it reports the death."""

M = TypeVar("M", Restore, Rebuild, Resumed, Release)

_session: Session | None = None


def current() -> Session | None:
    """The session of this process; None outside of the agent's workers."""
    return _session


def connect_from_env(leave: Callable[[], None]) -> Session:
    """Connect to the agent that the environment names, before the user's script runs.

    ``leave``: has the main thread leave the script; called on the listener's thread.
    """
    global _session
    path = os.environ["CHECKPOINTLESS_SOCKET"]
    rank = int(os.environ["RANK"])
    incarnation = int(os.environ["CHECKPOINTLESS_INCARNATION"])
    run_dir = os.environ["CHECKPOINTLESS_RUN_DIR"]
    lifeline.hold(lifeline_path(run_dir, rank, incarnation))
    channel = Channel(path, rank, incarnation, os.environ["CHECKPOINTLESS_TOKEN"])
    if channel.welcome.store:  # the store in which the job began may be lost
        os.environ["MASTER_ADDR"], _, os.environ["MASTER_PORT"] = channel.welcome.store.rpartition(":")
    _session = Session(channel, rank, run_dir, leave)
    if _session.shadow:
        expect(_session.run_dir, rank)
    _session.registry.install()
    channel.listen(_session.take)
    return _session


def forget() -> None:
    """The script is run again: it gets a session of its own."""
    global _session
    _session = None


class Superseded(Exception):
    """A newer generation was opened while a recovery went on: start over with its decision."""


class Session:
    """See the module. Implements the hosts that process groups and loops ask.

    Attributes:
        generation: of the membership this rank last ran in; -1 in a replacement that has not joined.
        frozen: the newest generation that a Freeze named; the rank is frozen while it is above ``generation``.
        step: committed steps.
        shadow: this is a replacement that has not joined.
        returns: this rank has not taken up yet what the last run of the script left behind, see `protocol.resize`.
        failed: the script's own exception is on its way out; the slot stays where it was raised.
        held_in: the generation of the newest Hold; -1 when no Freeze follows any more.
        late: a collective was asked for after the gate of the present call.
        void_memory: addresses of what collectives after its gate left as NaN.
        nodes: which ranks are on which node.
        pulse: tells the agent what the main thread does.
        again: how the script is to be run again, once this worker is out of it.
        cursor, resume: see data.loops.LoopHost.
    """

    def __init__(self, channel: Channel, rank: int, run_dir: str, leave: Callable[[], None]) -> None:
        self.rank = rank
        self.run_dir = run_dir
        self.channel = channel
        self.shadow = channel.welcome.shadow
        self.frozen = channel.welcome.generation
        self.generation = -1 if self.shadow else channel.welcome.generation
        self.returns = channel.welcome.returns
        self.step = 0
        self.phase = Phase.COMPUTING
        self.in_call = False
        self.committed = False
        self.void_memory: set[int] = set()
        self.late = False
        self.failed = False
        self.held_in = -1
        self._loaded = frozenset(sys.modules)
        self._thread = threading.main_thread().ident or 0
        self.slot = Slot.open(slot_path(run_dir, rank))
        self.cursor = Cursor.new()
        self.resume: Resume | None = None
        self.recovery: Recovery | None = None
        self.lock = threading.Lock()
        self._news = threading.Condition(self.lock)
        self.nodes = Nodes(channel.welcome.bases)
        self.freeze_seen = threading.Event()
        self._ballot = Ballot.open(ballot_path(run_dir), rank)
        self.registry = Registry(self, shadow=self.shadow)
        self.pulse = Pulse(pulse_path(run_dir, rank))
        engine, pulse = self.registry.engine, self.pulse
        engine.counts, engine.place, engine.first = pulse.counts, pulse.place, pulse.first
        self.again: queue.SimpleQueue[Again] = queue.SimpleQueue()
        self._leave = leave
        self._log = StartupLog(self.slot, replays=self.shadow)
        self._stashed: Decision | None = None
        self._affecting = threading.Lock()
        self._affected: frozenset[int] = frozenset()
        self._affected_in = -1
        if self.shadow:
            self.freeze_seen.set()

    # ---- listener thread

    def take(self, message: ToWorker) -> None:
        """A control message has come."""
        if isinstance(message, Freeze):
            self._freeze(message)
        elif isinstance(message, Hold):
            self.held_in = message.generation
        elif isinstance(message, Explain):
            self.channel.control.send(explain())
        elif isinstance(message, Unwind):
            self._unwind()
        elif isinstance(message, Again):
            self.channel.expect_end()
            self.again.put(message)

    def _unwind(self) -> None:
        with self.lock:
            self.frozen = max(self.frozen, self.generation) + 1
            self._news.notify_all()
        self._ballot.ring()
        self.registry.abandon()
        self.freeze_seen.set()
        self._leave()

    def _freeze(self, message: Freeze) -> None:
        with self.lock:
            self.frozen = max(self.frozen, message.generation)
            self._news.notify_all()
            whole, protected = not self.shadow, self.recovery is not None
            answer = Frozen(message.generation, self.step, self.phase, whole, protected)
        self._ballot.ring()
        self.registry.supersede(message.generation)
        if message.store_lost:
            self.registry.forget_lazy()
        self.affect(message.generation, [*message.lost, *message.left])
        with self.lock:
            if self.frozen > self.generation:  # else it was repeated for others, and this rank has resumed
                self.freeze_seen.set()
        self.channel.control.send(answer)

    def superseded(self, generation: int, seconds: float) -> bool:
        """Wait for the news of a newer generation; True as soon as there is one. Main thread."""
        with self._news:
            return self._news.wait_for(lambda: self.frozen > generation, seconds)

    def affect(self, generation: int, ranks: list[int]) -> None:
        """Void the groups of these ranks, once per generation and rank. Any thread."""
        with self._affecting:
            known = self._affected if generation == self._affected_in else frozenset()
            self._affected, self._affected_in = known | frozenset(ranks), generation
            if self._affected != known:
                self.registry.abort(self._affected)

    # ---- main thread: the vote

    def vote(self, said: bytes = b"") -> bool:
        """Say that this step is computed and wait for the verdict: True when it is committed, False when void.

        ``said``: what this rank says of its state, see `protocol.checks`.
        """
        with self.lock:  # a Freeze is answered before this vote or after it
            if self.is_frozen():
                return False  # our answer to Freeze was "computing", so nobody can have committed this step
            self.phase = Phase.READY
            counts = self._ballot.cast(self.step)
        if counts:
            if self._ballot.wait(self.step, self.is_frozen) and self._commit():
                return True
        else:
            self.channel.vote.send(Report(Stage.READY, self.generation, self.step, said))
        while True:
            message = self.channel.vote.receive()
            if isinstance(message, Commit):
                this = (message.generation, message.step) == (self.generation, self.step)
                if this and self._commit():
                    return True
            if isinstance(message, Decision) and message.generation >= self.frozen:
                self._stashed = message
                return self._advance(message.step)

    def _commit(self) -> bool:
        with self.lock:
            if self.is_frozen():
                return False  # the decision says the same
            self.step += 1
            self.phase = Phase.COMPUTING
            return True

    def _advance(self, target: int) -> bool:
        with self.lock:
            forward = target > self.step
            self.step = target
            self.phase = Phase.COMPUTING
            return forward

    # ---- main thread: recovery

    def settle(self) -> None:
        """Take part in the recovery that is under way; returns when the job runs again. A sync point."""
        if self.recovery is None:
            self.await_end()
        self.left_early()
        self.recovery.settle()  # type: ignore[union-attr]

    def await_end(self) -> None:
        """Without a Run nothing can be recovered here: the agent ends this worker and runs the script again."""
        while True:
            self.channel.vote.receive()

    def next_decision(self) -> Decision:
        """The decision of the newest generation; blocks."""
        while True:
            message = self._stashed or self.channel.vote.receive()
            self._stashed = None
            if isinstance(message, Decision) and message.generation >= self.frozen:
                return message

    def next_message(self, kind: type[M], generation: int) -> M:
        """The next message of this kind and generation; blocks. Raises Superseded when a newer decision comes."""
        while True:
            message = self.channel.vote.receive()
            if isinstance(message, Decision) and message.generation > generation:
                self._stashed = message
                raise Superseded
            if isinstance(message, kind) and message.generation == generation:
                return message

    def report(self, stage: Stage, generation: int, payload: bytes = b"") -> None:
        """Tell the agent that this rank has reached a stage."""
        self.channel.vote.send(Report(stage, generation, self.step, payload))

    def resumed(self, generation: int) -> bool:
        """The job runs again in this generation. False when a newer Freeze has come already."""
        with self.lock:
            self.generation = generation
            if self.shadow:
                self.resume = None
            self.shadow = self.returns = False
            if self.frozen > generation:
                return False
            self.freeze_seen.clear()
            return True

    def left_early(self) -> None:
        """This rank will not issue what survivors may wait for in groups that lost nobody: these are affected too.

        It left its void attempt through an exception, or has not begun the one that others are in.
        """
        self.freeze_seen.wait()  # the listener has voided the groups of lost ranks
        if self.registry.has_live_groups():
            self.channel.control.send(Left(self.frozen))

    def unfit(self, reason: str) -> None:
        """This rank cannot recover live: rung 3. Does not return, the agent ends this worker."""
        logger.error("[generation %d, rank %d, step %d] %s", self.frozen, self.rank, self.step, reason)
        self.channel.control.send(Mismatch(reason))
        self.await_end()

    def unhealthy(self, reason: str) -> None:
        """The device of this replacement does not work: its node leaves the job. Does not return."""
        logger.error("[rank %d] %s", self.rank, reason)
        self.channel.control.send(Unhealthy(reason))
        self.await_end()

    # ---- groups.host.Host

    def situation(self) -> Situation:
        """How a collective that cannot run for real is answered now."""
        if self.step and is_apart(self._thread):
            return Situation.APART
        if self.in_call:
            if not self.committed:
                return Situation.ATTEMPT
            self.late = True
            return Situation.COMMITTED
        return Situation.STARTUP if self.step == 0 else Situation.OUTSIDE

    def is_frozen(self) -> bool:
        """Is a freeze in force?"""
        return self.frozen > self.generation

    def wait_for_loss(self, explains: Callable[[], bool], hold: bool = True) -> bool:
        """See groups.host.Host. ``hold``: also while the agent says Hold, which has its own limit."""
        until = time.monotonic() + GRACE_S
        while not explains():
            if hold and self.held_in == self.frozen:
                until = time.monotonic() + GRACE_S
            elif time.monotonic() > until:
                return False
            time.sleep(GRACE_S / 100)
        return True

    def recover_outside(self) -> None:
        """A collective outside replayable functions needs a lost rank: recover, then it is repeated."""
        if self.shadow and self.recovery is not None:
            self.recovery.join()
        else:
            self.left_early()
            self.settle()

    def record(self, entry: LoggedCollective) -> None:
        """Keep the output of a collective outside replayable functions for this rank's replacement."""
        walk = self.resume if self.resume is not None and self.resume.real and not self.resume.live else None
        if not (walk.in_loop if walk is not None else len(self.cursor.stack) > 1):
            self._log.append(entry)
            return
        output = None if entry.outputs is None else msgspec.msgpack.encode(entry.outputs)
        note = walk.met_again if walk is not None else self.cursor.issued
        note(Outside(entry.group, entry.op, output))
        self.save()

    def replay(self, group: str, op: str) -> LoggedCollective | None:
        """In shadow: what the lost rank got from the same collective, None if it must be answered locally."""
        if self.resume is not None and self.resume.in_loop:
            found = self.resume.next_outside(group, op)
            if found is None:
                return None
            kept = found.output
            outputs = None if kept is None else msgspec.msgpack.decode(kept, type=tuple[bytes, ...])
            return LoggedCollective(group, op, outputs)
        return self._log.next(group)

    def void_after_commit(self, outputs: list[torch.Tensor]) -> None:
        """Outputs of collectives after the gate that were filled with NaN."""
        self.void_memory.update(output.untyped_storage().data_ptr() for output in outputs if output.numel())

    # ---- data.loops.LoopHost

    @property
    def stretch(self) -> int:
        """See `protocol.hangs.Where`."""
        return 2 * self.step + self.in_call

    def fetch_begins(self, frame: Frame) -> None:
        """A loop asks for its next item."""
        first = "first" if frame.position < 0 else "next"
        self.pulse.begin(Activity.DATA, f"{first} item of {frame.kind} {frame.path}", self.stretch)

    def fetch_ended(self) -> None:
        """It has it, or there is none."""
        self.pulse.end(self.stretch)

    def before_first_use(self) -> None:
        """A loop is entered. A replacement blocks until its state is there."""
        if self.recovery is not None:
            self._thread = threading.get_ident()
            self.recovery.prepare()
            self.recovery.record.loop_entered()

    def iteration_started(self) -> None:
        """A batch was fetched."""

    def save(self) -> None:
        """Write the cursor to the slot."""
        if self.recovery is not None and not self.shadow and not self.failed:
            self.recovery.record.between()

    # ---- the script's life

    def protect(self, recovery: Recovery) -> None:
        """The script has made a Run."""
        self.recovery, self._thread = recovery, threading.get_ident()
        self.channel.control.send(Protected())

    def learned(self) -> None:
        """Tell the agent which installed modules the script imported that the fork server had not loaded."""
        new = [name for name in third_party() if name not in self._loaded]
        if worth_learning(new, self._loaded):
            self.channel.control.send(Learned(new))

    def replicas(self, claims: list[list[int]], pieces: dict[str, tuple[int, int]]) -> None:
        """What this rank holds after the first step, see `Replicas`: the agent compares it between ranks."""
        self.channel.control.send(Replicas(claims, pieces))
