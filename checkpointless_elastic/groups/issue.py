"""What becomes of a collective that cannot simply be passed on to its native group.

The usual call never comes here: it is issued by `ElasticProcessGroup` and awaited by `ElasticWork`. Here are the
others: in shadow, on a void or a lazy group, outside of steps (where it is logged, and repeated after a loss), and
while DDP rebuilds its buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from checkpointless_elastic.errors import RankLostError
from checkpointless_elastic.groups.fill import fill_locally, fill_with_nan
from checkpointless_elastic.groups.host import Host, Situation
from checkpointless_elastic.groups.log import OutputLog, write_logged
from checkpointless_elastic.groups.ops import OPS, Call, Op
from checkpointless_elastic.groups.owed import Kept, Ledger, copied, keep
from checkpointless_elastic.groups.tasks import Tasks
from checkpointless_elastic.groups.work import ElasticWork

if TYPE_CHECKING:
    from checkpointless_elastic.groups.elastic import ElasticProcessGroup
    from checkpointless_elastic.groups.link import Link

__all__ = ["Engine", "Region"]


class Region(Protocol):
    """A stretch of code whose collectives are answered or captured and never filled, see `ddp`."""

    def answer(self, call: Call) -> bool:
        """Writes the outputs of a collective without the group. False: it is issued for real."""

    def capture(self, call: Call) -> None:
        """A collective that was issued for real has ended."""


_WAIT = "The agent decides what follows; nothing is to be done here."
_CATCH = (
    "What the thread does (a checkpoint) is not complete: catch this where its result is awaited, and go on."
)


class Engine:
    """One per worker process. Its methods run on the thread that issues or awaits the collective.

    Attributes:
        host: the worker's session.
        shadow: no peer may be contacted.
        generation: of the last rebuild, for messages.
        region: what answers collectives now, if anything.
        groups: every elastic group by name.
        batches: batches of coalesced collectives that are being gathered.
        attention: every collective must come through `issue`.
        calls: committed calls, with which each group stamps its uses.
        recovered_at: how many those were at the last rebuild.
        wake: connects a lazy group; when it returns the group is connected or void.
        ledger: this rank's collectives outside of steps.
        ending: all groups are being destroyed: they stay until all ranks have finished.
        native_futures: works give out the native future, whatever it costs when a peer is lost.
        counts: of collectives issued; that of a group is at ``place(name)``, and ``first()`` is called when one
            begins to count. Read by the agent, see `worker.pulse`.
    """

    def __init__(self, host: Host, *, shadow: bool) -> None:
        self.host = host
        self.shadow = shadow
        self.generation = 0
        self.region: Region | None = None
        self.groups: dict[str, ElasticProcessGroup] = {}
        self.batches = 0
        self.attention = shadow
        self.calls = 0
        self.recovered_at = -1
        self.wake: Callable[[ElasticProcessGroup], None] = _nobody
        self.ledger = Ledger()
        self.ending = False
        self.native_futures = False
        self.counts: list[int] | memoryview[int] = [0]
        self.place: Callable[[str], int] = lambda name: 0
        self.first: Callable[[], None] = lambda: None
        self._log = OutputLog(host)
        self._replayed: dict[str, int] = {}
        self._tasks = Tasks()

    def look(self) -> None:
        """Notes whether collectives need attention; to be called after a change of what decides it."""
        self.attention = bool(self.shadow or self.region or self.batches or self.ledger.owed)

    def issue(
        self, group: ElasticProcessGroup, op: Op, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ElasticWork | None:
        """One collective, whatever the state of its group. None where the native method returns None."""
        work = ElasticWork(group, group.link, None, op, method, args, kwargs)
        if self.host.situation() is Situation.APART:
            return self._apart(work)
        if self.region is not None and self.region.answer(work.call()):
            return work
        if self.shadow and self._in_shadow(work):
            return work
        self.settle()
        if group.link.lazy is not None:
            self.wake(group)
        situation = self.host.situation()
        if group.link.void and not self._void(work, situation, None):
            return work
        if self.region is not None:
            work.kept = Kept(None, region=self.region)
        elif situation in (Situation.STARTUP, Situation.OUTSIDE):
            work.kept = self._keep(work, situation)
        return self._natively(work)

    def _apart(self, work: ElasticWork) -> ElasticWork | None:
        """Nobody can say whether the peers' threads, or that of a replacement, ask for it too: it is not repeated."""
        if work.group.link.lazy is not None and not self.shadow:
            self.wake(work.group)
        work.apart = True
        link = work.group.link
        # Threads of other ranks that began in this step too may have met the loss, and will not come.
        late = link.generation == self.generation and self.calls == self.recovered_at
        if self.shadow or link.void or late or self._tasks.link_at_first(work.group) is not link:
            raise self._lost_error(work, "in a thread of the script", _CATCH)
        return self._natively(work)

    def _natively(self, work: ElasticWork) -> ElasticWork | None:
        group, link = work.group, work.group.link
        try:
            native = getattr(link.native, work.method)(*work.args, **work.kwargs)
        except BaseException as error:
            if not isinstance(error, RuntimeError) or not self._is_loss(link):
                self._forget(work)
                raise
            work.link = link
            self._lost(work, error)
            return work
        if native is None:
            self.succeeded(work)
            return None
        link.track(native)
        work.native, work.link = native, link
        if work.kept is not None and work.kept.entry is not None:
            work.kept.entry.native = native
        group.batch_up(work)
        return work

    def succeeded(self, work: ElasticWork) -> None:
        """A collective that is logged, kept or captured has ended natively."""
        kept, work.kept = work.kept, None
        if kept is not None:
            if work in self.ledger.pending:
                self.ledger.pending.remove(work)
            if kept.entry is not None:
                self._log.close(work.group.group_name, kept.entry)
            if kept.region is not None:
                kept.region.capture(work.call())
            self.ledger.finish(work.group.group_name, work.method, kept)

    def failed(self, work: ElasticWork, error: RuntimeError) -> bool:
        """A native work ended with an error. False: no loss explains it, the caller raises it.

        True: its outputs are filled, or it was repeated with success.
        """
        if work.link is None or not self._is_loss(work.link):
            self._forget(work)
            return False
        self._lost(work, error)
        return True

    def settle(self) -> None:
        """Issues again, on copies, what members behind this rank still need. Blocks until they have it.

        A further loss ends it early: the next rebuild compares anew.
        """
        while self.ledger.owed:
            owed = self.ledger.owed[0]
            group = self.groups[owed.group]
            if owed.again is None:
                raise RankLostError(
                    f"{OPS[owed.method].name} on group {owed.group} cannot be repeated for a rank that needs it in "
                    f"generation {self.generation}: it was too large to keep. Put it into a replayable function."
                )
            args, kwargs = copied(owed.again)
            try:
                native = getattr(group.link.native, owed.method)(*args, **kwargs)
                if native is not None:
                    group.link.wait(native, on_device=group.link.on_device(args, kwargs))
            except RuntimeError:
                if not self._is_loss(group.link):
                    raise
                return
            self.ledger.owed.pop(0)
        self.look()

    def _is_loss(self, link: Link) -> bool:
        """True if the group of this native group has lost a member, asked again after a short wait for news."""
        return link.void or self.host.wait_for_loss(lambda: link.void)

    def _lost(self, work: ElasticWork, error: RuntimeError) -> None:
        """A collective in flight lost a member: repeats it outside of steps, else fills it."""
        situation = Situation.APART if work.apart else self.host.situation()
        if situation is Situation.OUTSIDE and work.kept is not None and self._repeatable(work):
            self._repeat(work, error)
        else:
            self._void(work, situation, error)

    def _repeatable(self, work: ElasticWork) -> bool:
        return self.region is None and not work.op.point_to_point

    def _void(self, work: ElasticWork, situation: Situation, error: RuntimeError | None) -> bool:
        """What a collective on a void group gives. True: the group was rebuilt, it can be issued now."""
        if self.region is not None:
            raise self._lost_error(work, "while DDP rebuilds its buckets") from error
        if situation is Situation.STARTUP:
            raise self._lost_error(work, "before the first step") from error
        if situation is Situation.APART:
            raise self._lost_error(work, "in a thread of the script", _CATCH) from error
        if situation is Situation.OUTSIDE:
            if error is not None:
                raise self._lost_error(
                    work, "outside of a replayable function and cannot be repeated"
                ) from error
            self._recover(work)
            return True
        work.native = None
        if situation is Situation.ATTEMPT:
            fill_locally(work.op, work.call())
        else:
            self.host.void_after_commit(fill_with_nan(work.op, work.call()))
        return False

    def _repeat(self, work: ElasticWork, error: RuntimeError) -> None:
        """Recovers, then issues again everything that was in flight, in its old order, until this one has ended."""
        while work.kept is not None:
            self._recover(work)
            try:
                self.settle()
                for other in [*self.ledger.pending]:
                    self._reissue(other, error)
                if work.native is not None and work.link is work.group.link:
                    self._wait_again(work, work.link)
            except RankLostError:
                raise
            except RuntimeError as again:
                if not self._is_loss(work.group.link):
                    self._forget(work)
                    raise
                error = again

    def _wait_again(self, work: ElasticWork, link: Link) -> None:
        on_device = link.on_device(work.args, work.kwargs)
        link.wait(work.native, on_device=on_device)
        if on_device:
            torch.cuda.current_stream(link.device).synchronize()
            if link.void:
                raise RuntimeError("the communicator was aborted")
        self.succeeded(work)

    def _reissue(self, work: ElasticWork, error: RuntimeError) -> None:
        """Issues a pending collective on the new native group; leaves one alone whose group was not affected."""
        kept, link = work.kept, work.group.link
        if kept is None or link.void or work.link is link:
            return
        if not kept.unchanged():
            raise self._lost_error(
                work, "outside of a replayable function, and its buffers have changed"
            ) from error
        kept.restore()
        native = getattr(link.native, work.method)(*work.args, **work.kwargs)
        work.native, work.link = native, link
        if native is None:
            self.succeeded(work)
        else:
            link.track(native)

    def _lost_error(self, work: ElasticWork, where: str, then: str = _WAIT) -> RankLostError:
        name = work.group.group_name
        return RankLostError(
            f"{work.op.name} on group {name} lost a rank in generation {self.generation}, {where}. {then}"
        )

    def _recover(self, work: ElasticWork) -> None:
        """Blocks in the recovery until the group of this work has a native group again."""
        while work.group.link.void:
            if work.group.link.lazy is not None:
                self.wake(work.group)
            else:
                self.host.recover_outside()

    def _keep(self, work: ElasticWork, situation: Situation) -> Kept:
        call, group = work.call(), work.group.group_name
        kept = Kept(None)
        if situation is Situation.OUTSIDE and not work.op.point_to_point:
            kept = keep(work.op, work.args, work.kwargs, call.all_tensors(), work.op.writes(call))
            self.ledger.number(group, kept)
            self.ledger.pending.append(work)
        kept.entry = self._log.open(group, work.op, call)
        return kept

    def _forget(self, work: ElasticWork) -> None:
        """The collective ended with an error of the script's own: it leaves log and ledger."""
        kept, work.kept = work.kept, None
        if kept is not None:
            if work in self.ledger.pending:
                self.ledger.pending.remove(work)
            if kept.entry is not None:
                self._log.drop(work.group.group_name, kept.entry)

    def _in_shadow(self, work: ElasticWork) -> bool:
        """Answers from the log or locally. False: this rank has left shadow, the collective is issued for real."""
        op, name, situation = work.op, work.group.group_name, self.host.situation()
        logged = self.host.replay(name, op.name)
        if logged is None:
            if situation is Situation.OUTSIDE:
                self._recover(work)
                return False
            fill_locally(op, work.call())
            return True
        kept = Kept(None)
        if situation is Situation.OUTSIDE and not op.point_to_point:
            kept.again = copied((work.args, work.kwargs)) if logged.outputs is not None else None
            self.ledger.number(name, kept)
        position = self._replayed[name] = self._replayed.get(name, 0) + 1
        if not write_logged(logged, op, work.call(), position):
            fill_locally(op, work.call())
        self.ledger.finish(name, work.method, kept)
        return True


def _nobody(group: ElasticProcessGroup) -> None:
    """No group is lazy without a registry."""
