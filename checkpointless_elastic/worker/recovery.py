"""A worker's part in a recovery, on its main thread: publish or restore state, rebuild groups, resume.

Every rank follows the decision of its generation: a rank that the decision names as pending restores, all others
publish. Whenever a newer generation opens, what is under way is dropped and the newer decision is followed from its
start; nothing here changes state that a second try would not overwrite.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from checkpointless_elastic.data.resume import Join, Resume, Skip
from checkpointless_elastic.errors import CheckpointlessError, ScriptMismatchError, StateMismatchError
from checkpointless_elastic.groups import spec as groups
from checkpointless_elastic.groups.patch import set_group_count
from checkpointless_elastic.groups.spec import GroupSignature
from checkpointless_elastic.protocol.checks import Published
from checkpointless_elastic.protocol.hangs import Activity
from checkpointless_elastic.protocol.messages import Decision, Rebuild, Restore, Stage
from checkpointless_elastic.protocol.messages import Resume as ResumeNow
from checkpointless_elastic.protocol.resize import NOT_OWN
from checkpointless_elastic.state import pipelines
from checkpointless_elastic.state.pieces import Manifest, is_gradient
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import mirror, resize, rng
from checkpointless_elastic.worker.blocks import Shared
from checkpointless_elastic.worker.exchange import (
    Here,
    Publication,
    bucket_orders,
    publication_of,
    publish,
    receive,
    reserve,
    send_state,
    shared,
)
from checkpointless_elastic.worker.health import broken_device
from checkpointless_elastic.worker.network import Network
from checkpointless_elastic.worker.private import At, PrivateState, read_state
from checkpointless_elastic.worker.record import Record, follow
from checkpointless_elastic.worker.session import Session, Superseded
from checkpointless_elastic.worker.values import decode_value
from checkpointless_elastic.worker.wire import RebuiltReport, RestoredReport

if TYPE_CHECKING:
    from checkpointless_elastic.worker.run import Run

logger = logging.getLogger(__name__)

STORE_TIMEOUT = timedelta(seconds=60)
PATIENCE_S = 10.0
"""How long the news of a lost node may take after a connection to it has failed."""


class _Landed(NamedTuple):
    """What a replacement was given, and the signs of its state then, see `Inventory.signs`."""

    publications: dict[int, Publication]
    manifest: Manifest
    signs: tuple[bytes, list[int]]


class Recovery:
    """Belongs to the Run of this process.

    Attributes:
        record: this rank's own state, in its slot.
        mirror: this rank's mirrors.
    """

    def __init__(self, session: Session, run: Run) -> None:
        self._session = session
        self._run = run
        self._decision: Decision | None = None
        self._exchanged = -1
        self._restored = RestoredReport(0, 0.0)
        self._join_rng: rng.RngState | None = None
        self._replica_value: bytes | None = None
        self._segments: list[Segment] = []
        self._store: Store | None = None
        self._store_at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._begun_at = self._store_at
        self._stale = -1  # the last generation in which workers met in another store
        self._state: PrivateState | None = None
        self._groups: dict[int, list[GroupSignature]] = {}
        self._landed: _Landed | None = None
        self.record = Record(session, run)
        self.mirror = mirror.Mirror(run, session)

    # ---- following a decision

    def settle(self) -> None:
        """Take part until the job runs again."""
        session = self._session
        while True:
            session.pulse.idle(Activity.RECOVERY, session.stretch)
            try:
                self._follow()
                pipelines.start_over()
                if session.resumed(self._exchanged):
                    session.pulse.end(session.stretch, learn=False)
                    return
                session.left_early()  # others may have begun the next attempt
            except (Superseded, groups.Superseded):
                logger.debug("[rank %d] generation %d was superseded", session.rank, self._exchanged)
            except CheckpointlessError as error:
                session.unfit(str(error))
            except (RuntimeError, FileNotFoundError) as error:
                self._cut_off(error)

    def _cut_off(self, error: Exception) -> None:
        """A peer or the store is gone: returns with the news that explains it, else raises the error."""
        assert self._decision is not None
        if not self._session.superseded(self._decision.generation, PATIENCE_S):
            raise error

    def _follow(self) -> None:
        session = self._session
        if self._decision is None or self._decision.generation < session.frozen:
            self._decision = session.next_decision()
        decision = self._decision
        if self._exchanged != decision.generation:
            self._exchange(decision)
        generation = decision.generation
        if session.rank in decision.pending:
            self._report_use(decision)
            session.report(Stage.RESTORED, generation, msgspec.msgpack.encode(self._restored))
        affected = session.next_message(Rebuild, generation).affected
        session.affect(generation, affected)
        aborts = session.registry.aborts
        if session.frozen > generation:
            raise Superseded
        store, moved = self._job_store(decision), bool(decision.store)
        report = session.registry.rebuild(store, generation, aborts=aborts, moved=moved)
        payload = RebuiltReport(len(report.rebuilt), len(report.kept), len(report.lazy), report.seconds)
        session.report(Stage.REBUILT, generation, msgspec.msgpack.encode(payload))
        session.next_message(ResumeNow, generation)
        self._release_segments()

    def _exchange(self, decision: Decision) -> None:
        session = self._session
        self._release_segments()
        if session.rank in decision.pending:
            session.report(Stage.ARRIVED, decision.generation)
            came = session.next_message(Restore, decision.generation).publications
            self._restore(decision, {rank: publication_of(data) for rank, data in came.items()})
        elif decision.resizes:
            own = resize.keep(self._run, decision, self._here(), self.record.own, self.record.last_value)
            session.report(Stage.PUBLISHED, decision.generation, b"" if own else NOT_OWN)
        else:
            if session.returns:
                self._take_up(decision)
            published, self._segments = self._publish(decision)
            self._report_use(decision)
            session.report(Stage.PUBLISHED, decision.generation, msgspec.msgpack.encode(published))
            self._send(decision)
        self._exchanged = decision.generation

    def _publish(self, decision: Decision) -> tuple[Published, list[Segment]]:
        afresh = self._session.returns
        publication, segments = publish(self._run, decision, self._here(), self.record.last_value, afresh)
        if afresh and publication.shared is not None and self.record.own is not None:
            own = self.record.own.whole()
            publication = msgspec.structs.replace(publication, own=own.blob, parts=dict(own.parts))
        said = self._run.said() if decision.pending else b""
        return Published(said, msgspec.msgpack.encode(publication)), segments

    def _take_up(self, decision: Decision) -> None:
        """What this rank left behind in the last run of the script."""
        entry = resize.take_up(self._run, decision.step, self._here())
        self._go_on(decision.step, entry.shared, entry.private, entry.parts)

    def _go_on(self, step: int, common: Shared, blob: bytes, parts: dict[int, bytes]) -> None:
        """The script is run anew by all ranks: go on at this step with that private state."""
        session, run = self._session, self._run
        state = resize.ready_to_go_on(blob, parts, session.rank)
        run.go_on_from(common)
        self._replica_value = self.record.last_value = common.last_value
        self._state, self.record.own = state, resize.Own(state.step, Content(blob, parts))
        session.cursor, session.step = state.cursor, step
        session.resume = Resume(state.cursor, real=True)
        session.registry.committed(step)
        run.restore_private(state.tensors)

    def _return(self) -> None:
        """Before the first loop or replayable call of such a run: returns when all ranks have their state."""
        session = self._session
        while session.returns:
            try:
                self._follow()
                session.resumed(self._exchanged)
            except (Superseded, groups.Superseded):
                continue
            except CheckpointlessError as error:
                session.unfit(str(error))
            except (RuntimeError, FileNotFoundError) as error:
                self._cut_off(error)

    def _here(self) -> Here:
        return Here(self._session.rank, self._session.nodes, self._session.run_dir)

    def _network(self, decision: Decision) -> Network:
        session = self._session
        store = functools.partial(self._job_store, decision)
        return Network(session.registry, store, decision.generation, session.rank)

    def _send(self, decision: Decision) -> None:
        """A peer that is gone ends this: the news of it, or that nobody misses it, comes as the next message."""
        try:
            send_state(self._run, decision, self._here(), self._network(decision))
        except RuntimeError:
            session = self._session
            if not session.channel.vote.readable(PATIENCE_S) and not session.superseded(
                decision.generation, 0
            ):
                raise  # nobody else was lost: the receivers wait for what would never come

    def _report_use(self, decision: Decision) -> None:
        store, moved = self._job_store(decision), bool(decision.store)
        self._session.registry.report_use(store, decision.generation, moved=moved, stale=self._stale)

    def _release_segments(self) -> None:
        for segment in self._segments:
            segment.close()
            segment.unlink()
        self._segments = []

    def reserve(self) -> None:
        """Get the memory ready that a recovery needs; after the first step, when all state is there."""
        reserve(self._run, self._here(), int(os.environ["LOCAL_WORLD_SIZE"]))
        pipelines.find()
        if self._store is None:  # a new connection may wait seconds for a name server
            self._store = _open_store(self._store_at)

    def _job_store(self, decision: Decision) -> Store:
        """Where workers meet in the generation of this decision. Blocks; raises `groups.Superseded`."""
        address = decision.store or self._begun_at
        if self._store is None or address != self._store_at:
            open_it = functools.partial(_open_store, address)
            self._store = self._session.registry.apart(decision.generation, None, open_it)
            if address != self._store_at:
                self._stale = decision.generation - 1
            self._store_at = address
        return self._store

    # ---- a replacement

    def prepare(self) -> None:
        """At the first loop or replayable call: blocks until the state is there that this rank takes over, if any."""
        session = self._session
        if session.returns:
            self._return()
        if session.shadow and session.resume is None and (reason := broken_device()):
            session.unhealthy(reason)
        while session.shadow and session.resume is None:
            try:
                self._decision = session.next_decision()
                self._exchange(self._decision)
            except (Superseded, groups.Superseded):
                continue
            except CheckpointlessError as error:
                session.unfit(str(error))
            except (RuntimeError, FileNotFoundError) as error:
                self._cut_off(error)

    def join(self) -> None:
        """In a replacement, where the survivors wait: returns when it is a rank like all others."""
        self.prepare()
        pipelines.find()
        self._compare_groups()
        self._catch_up()
        self._drop_own_changes()
        self.settle()
        if self._join_rng is not None:
            rng.restore(self._join_rng)
        self._join_rng = None

    def _catch_up(self) -> None:
        """How many collectives the lost rank had issued here: in a loop the slot says it, outside of loops the log."""
        state, in_loop = self._state, len(self._session.cursor.stack) > 1
        if state is None:
            return
        if state.step == self._session.step:
            self._session.registry.catch_up(state.issued, exact=in_loop)
        elif in_loop:
            self._session.registry.catch_up({}, exact=True)

    def _drop_own_changes(self) -> None:
        """What the script has changed in objects of the Run on its way here, survivors had changed when they published.

        So a scheduler that steps between calls does it once. Raises ScriptMismatchError where that cannot be had.
        """
        landed, self._landed = self._landed, None
        if landed is None or (signs := self._run.inventory.signs()) == landed.signs:
            return
        if signs[1] == landed.signs[1]:
            self._run.inventory.adopt(landed.manifest)  # the tensors are there, and stay
            self._run.inventory.load_meta(landed.manifest)
        elif len(self._session.nodes.bases) > 1:
            raise ScriptMismatchError(
                "tensors of the Run are changed between replayable calls, which a replacement on another node than its "
                "survivors cannot undo; do it in a replayable function."
            )
        else:
            assert self._decision is not None
            try:
                self._restore(self._decision, landed.publications)
            except CheckpointlessError as error:
                self._session.unfit(str(error))
            except (RuntimeError, FileNotFoundError) as error:
                self._cut_off(error)

    def _compare_groups(self) -> None:
        """Raises ScriptMismatchError where this rank's groups are not those of the survivors."""
        own = self._run.signature()
        for rank, known in sorted(self._groups.items()):
            mine = [group for group in own if rank in group.ranks]
            theirs = [group for group in known if self._session.rank in group.ranks]
            for number, (here, there) in enumerate(zip(mine, theirs, strict=False)):
                if here != there:
                    raise ScriptMismatchError(
                        f"group {number} of those with rank {rank} is {here} in the replacement, {there} there."
                    )
            if len(mine) != len(theirs):
                raise ScriptMismatchError(
                    f"The replacement has made {len(mine)} process groups with rank {rank}, that rank {len(theirs)}."
                )

    def enter_call(self) -> tuple[bool, Any]:
        """A replayable call is asked for in shadow: (True, its value) if it is committed, else joins: (False, None)."""
        self.prepare()
        assert self._session.resume is not None
        answer = self._session.resume.next_call()
        if isinstance(answer, Join):
            if self._session.shadow:
                self.join()
            self._session.resume = None
            return False, None
        return True, self._skip(answer)

    def _skip(self, answer: Skip) -> Any:
        self._session.registry.committed(self._session.step)
        if answer.rng is not None:
            rng.restore(answer.rng)
        data = answer.value if answer.value is not None else self._replica_value
        if data is None:
            logger.warning("[rank %d] a committed call's return value was not kept: None", self._session.rank)
            return None
        return decode_value(data)

    def _restore(self, decision: Decision, publications: dict[int, Publication]) -> None:
        started = time.perf_counter()
        run_dir, rank = self._session.run_dir, self._session.rank
        twin, kept = shared(publications, rank), None
        buckets: list[bytes | None] = []
        if twin is None:
            kept = mirror.find(run_dir, rank, decision.step)
            twin, buckets = kept.shared, kept.buckets
        elif not self._session.returns:
            buckets = bucket_orders(publications, twin.twins)
        network, afresh = self._network(decision), self._session.returns
        moved, copying = receive(
            self._run, decision, publications, twin, self._here(), network, self._segments
        )
        if afresh:
            speaker = next(found for found in publications.values() if found.shared is twin)
            self._go_on(decision.step, twin, speaker.own, speaker.parts)
            self._restored = RestoredReport(moved, time.perf_counter() - started, copying)
            return
        self._run.adopt(twin, buckets)
        self.mirror.continue_at(decision.step)
        self._replica_value = self.record.last_value = twin.last_value
        self._groups = {rank: publication.groups for rank, publication in publications.items()}
        lands = self._session.resume is None
        if lands:
            if publications:
                set_group_count(max(published.group_count for published in publications.values()))
            self._take_private(decision.step, kept)
        self._session.step = decision.step
        self._run.restore_private(self._private_tensors())
        if lands:
            self._landed = _Landed(publications, twin.manifest, self._run.inventory.signs())
        self._restored = RestoredReport(moved, time.perf_counter() - started, copying)

    def _take_private(self, step: int, kept: mirror.Entry | None) -> None:
        """Adopt the lost rank's own state: its cursor, and the random state to join with."""
        session = self._session
        state = read_state(session.slot)
        if state is None:
            raise StateMismatchError(f"rank {session.rank} left no private state in its slot")
        if kept is not None and state.step > step:  # all ranks go back
            state = kept.private_state()
        cursor = state.cursor
        if state.step == step - 1 and state.at is At.READY:
            follow(state, session.slot.sequence, session.pulse)
        elif state.step != step:
            raise StateMismatchError(
                f"rank {session.rank} was lost at step {state.step} ({state.at.value}), the others go on at step {step}"
            )
        elif state.at is not At.BETWEEN:
            self._join_rng = state.rng
        counted = sum(frame.earlier for frame in cursor.stack)
        if counted:
            logger.warning(
                "[rank %d] %d calls of one iteration are too long ago: their return values are that of the last call. "
                "Loop with run.steps() or run.batches(), so that an iteration has few calls.",
                session.rank,
                counted,
            )
        self._state = state
        session.cursor = cursor
        session.resume = Resume(cursor)
        session.registry.committed(step)

    def _private_tensors(self) -> dict[str, bytes]:
        state = self._state
        assert state is not None
        if state.step == self._session.step:
            return state.tensors
        here = {piece.key for piece in self._run.inventory.pieces()}  # gradients may have been dropped since
        return {key: data for key, data in state.ready_tensors.items() if key in here or not is_gradient(key)}


def _open_store(address: str) -> Store:
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=STORE_TIMEOUT)
