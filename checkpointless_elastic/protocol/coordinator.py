"""The coordinator: decides for the job. Every state and transition stands in TABLE, at the end.

The rule: a step is committed when every rank was ready for it, and in no other way; a recovery takes every rank to one
and the same step. Terms: ``whole`` ranks hold the state of their step; ``pending`` ranks are replacements that do not
yet; ``lost`` ranks are those lost since the job last ran (their groups are void until it runs again).

``handle(event)`` returns actions and changes this object; it does no input or output and reads no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.events import (
    Action,
    AllFrozen,
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
    Tally,
    Unfit,
)
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Frozen,
    Phase,
    Rebuild,
    Release,
    Replicas,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.mirrors import last_due


class State(str, enum.Enum):
    """States of the coordinator."""

    RUNNING = "running"  # steps are committed
    FREEZING = "freezing"  # a generation is open, survivors say where they stand
    SETTLING = "settling"  # survivors publish, replacements start
    RESTORING = "restoring"  # replacements copy the state and go to the survivors' step
    REBUILDING = "rebuilding"  # all ranks rebuild affected groups
    ENDED = "ended"  # released, to be run again, or stopped


class Coordinator:
    """Decides for one run of the script by ``ranks``, which keep mirrors of every ``mirror_every``-th step (0: none).

    A lost rank without a live twin takes its state from its mirror, if that is of the step at which all go on. If it is
    older, all go back to it: the survivors are ended too, and every rank goes on from its mirror.

    Attributes:
        step: the step that is committed next; 0 before the first commit.
    """

    def __init__(
        self, ranks: frozenset[int], max_faults_per_step: int, generation: int = 0, mirror_every: int = 0
    ) -> None:
        self.ranks = ranks
        self.generation = self._ran_in = generation  # now, and when the job last ran
        self.state = State.RUNNING
        self.step = 0
        self.whole = set(ranks)
        self.pending: set[int] = set()
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self.exited: set[int] = set()
        self.decision: Decision | None = (
            None  # in force while a recovery goes on, for workers that connect late
        )
        self.resumed = False  # a recovery has ended and its first step is not yet committed
        self._max_faults = max_faults_per_step
        self._faults_since_commit = 0
        self._errors: dict[int, tuple[int, str]] = {}
        self._unprotected: set[int] = set(ranks)
        self._held: dict[int, Replicas] = {}
        self._twins: dict[int, frozenset[int]] = {}  # of each rank, those that hold all that it holds
        self._mirror_every = mirror_every
        self._mirrored: dict[int, int] = {}  # of lost ranks, the step of their newest mirror
        self._back_to: int | None = None  # the step to which all ranks go back
        self._ended: set[int] = set()  # survivors that were ended for it and are not yet gone
        self.distrust = ""  # why live recovery would not give the right state; empty: it would
        self._frozen: dict[int, Frozen] = {}
        self._reports: dict[Stage, dict[int, bytes]] = {}

    def protect(self, rank: int) -> None:
        """This rank's script has made a Run."""
        self._unprotected.discard(rank)

    @property
    def protected(self) -> bool:
        """Can a loss be answered by rung 1, as far as is known now?"""
        return self.step > 0 and not self._unprotected and not self.distrust

    def compare(self, rank: int, held: Replicas) -> str:
        """Take what a rank holds; a sentence when all are in and are not as they claim, else ''."""
        self._held[rank] = held
        if self._held.keys() != self.ranks:
            return ""
        holders: dict[tuple[str, frozenset[int]], dict[int, int]] = {}
        for other in sorted(self.ranks):
            claims = [frozenset(claim) or self.ranks for claim in self._held[other].claims]
            self._twins[other] = self.ranks.intersection(*claims)
            for key, (claim, digest) in self._held[other].pieces.items():
                holders.setdefault((key, claims[claim]), {})[other] = digest
        self.distrust = next(
            filter(None, (_disagreement(key, ranks, held) for (key, ranks), held in holders.items())), ""
        )
        return self.distrust

    def exposed(self) -> list[int]:
        """Ranks that hold something that no other rank holds, as far as is known."""
        return [rank for rank, twins in sorted(self._twins.items()) if twins == {rank}]

    def survivable(self) -> int:
        """How many ranks may be lost at once, whichever of those are not `exposed` they are; 0 as far as is known."""
        return min((len(twins) - 1 for twins in self._twins.values() if len(twins) > 1), default=0)

    def handle(self, event: Event) -> list[Action]:
        """Take one event. Raises ProtocolError if the event is not allowed in this state."""
        handler = TABLE.get((self.state, type(event)))
        if handler is None:
            raise ProtocolError(f"The coordinator got {type(event).__name__} in state {self.state.value}.")
        return handler(self, event)

    # ---- normal steps

    def _tally(self, event: Tally) -> list[Action]:
        if event.generation != self.generation:
            return []  # from before a freeze: the rank's answer to Freeze says the same better
        reports = self._reports.setdefault(event.stage, {})
        if event.stage is Stage.READY and event.step != self.step:
            raise ProtocolError(
                f"Ranks {sorted(event.reports)} are ready for step {event.step}, not {self.step}."
            )
        reports.update(event.reports)
        return COMPLETED[event.stage](self) if self._expected(event.stage) <= reports.keys() else []

    def _expected(self, stage: Stage) -> set[int]:
        if stage is Stage.PUBLISHED:
            return self.whole
        if stage in (Stage.ARRIVED, Stage.RESTORED):
            return self.pending
        return set(self.ranks) - (self.exited if stage is Stage.FINISHED else set())

    def _commit(self) -> list[Action]:
        if self.state is not State.RUNNING:
            return []
        del self._reports[Stage.READY]
        commit = Commit(self.generation, self.step)
        self.step += 1
        self._faults_since_commit = 0
        actions: list[Action] = [Broadcast(commit)]
        if self.resumed:
            self.resumed = False
            actions.append(Reached(self.generation, "committed", {"step": commit.step}))
        return actions

    def _finish(self) -> list[Action]:
        self.state = State.ENDED
        return [Broadcast(Release(self.generation)), Succeed()]

    def _exited_early(self, event: ExitedEarly) -> list[Action]:
        self.exited.add(event.rank)
        finished = self._reports.get(Stage.FINISHED, {}).keys()
        return self._finish() if self._expected(Stage.FINISHED) <= finished else []

    # ---- a fault

    def _lost(self, event: Lost) -> list[Action]:
        stop = None if event.rank in self._ended else self._repeated(event)
        if stop:
            return self._end(stop)
        self._ended.discard(event.rank)
        self._mirrored[event.rank] = event.mirrored
        newly = {event.rank} | self.exited
        self.exited = set()
        self.lost |= newly
        self.whole -= newly
        self.pending |= newly
        if not self.protected:
            return self._end(Restart(3, self._why_not_live(event)))
        stranded = self._stranded()
        if stranded and not self._mirror_every:
            return self._end(Restart(3, f"no survivor holds the state of rank {stranded[0]}"))
        replaced: list[Action] = [Replace(rank) for rank in sorted(newly)]
        actions = replaced + self._open(event.cause)
        return actions if self.whole else actions + self._decide()

    def _stranded(self) -> list[int]:
        """Lost ranks of which no live rank holds all that they held."""
        return [rank for rank in sorted(self.pending) if not self._twins.get(rank, self.ranks) & self.whole]

    def _why_not_live(self, event: Lost) -> str:
        if self.distrust:
            return f"rank {event.rank} {event.cause}, and {self.distrust}"
        if self._unprotected:
            rank = min(self._unprotected)
            return f"rank {event.rank} {event.cause}, and the script of rank {rank} has made no Run"
        return f"rank {event.rank} {event.cause} before the first step was committed"

    def _repeated(self, event: Lost) -> Action | None:
        self._faults_since_commit += 1
        failure = (self.step, event.error)
        if event.error and self._errors.get(event.rank) == failure:
            reason = f"rank {event.rank} failed twice at step {self.step} with the same error: {event.error}"
            return Restart(3, reason) if event.rank in self.pending else Stop(reason, (event.rank,))
        if event.error:
            self._errors[event.rank] = failure
        if self._faults_since_commit > self._max_faults:
            reason = f"{self._faults_since_commit} faults at step {self.step} without a committed step between them"
            return Stop(reason, (event.rank,))
        return None

    def _end(self, action: Action) -> list[Action]:
        self.state = State.ENDED
        return [action]

    def _open(self, cause: str) -> list[Action]:
        self.generation += 1
        self.state = State.FREEZING
        self.resumed = False
        self.decision = None
        self._frozen = {}
        self._reports = {}
        return [
            Opened(self.generation, frozenset(self.lost), cause),
            Broadcast(self._freeze()),
            Deadline(self.generation, self.state.value, "settle_timeout"),
        ]

    def _freeze(self) -> Freeze:
        return Freeze(self.generation, sorted(self.lost), sorted(self.left))

    def _left_early(self, event: LeftEarly) -> list[Action]:
        if event.generation <= self._ran_in or event.rank in self.left or event.rank not in self.whole:
            return []  # of a recovery that has ended, or of a worker that is gone
        self.left.add(event.rank)
        return [Broadcast(self._freeze())]

    def _all_frozen(self, event: AllFrozen) -> list[Action]:
        if event.generation != self.generation:
            return []
        self._frozen.update(event.reports)
        if not self.whole <= self._frozen.keys():
            return []
        return self._decide()

    def _decide(self) -> list[Action]:
        if self._back_to is not None:
            return [] if self.whole else self._settle(self._back_to, "back")
        answers = {rank: self._frozen[rank] for rank in self.whole}
        target = max([self.step] + [answer.step for answer in answers.values()])
        behind = [
            r
            for r, a in answers.items()
            if a.step != target and (a.step, a.phase) != (target - 1, Phase.READY)
        ]
        if behind:
            rank = min(behind)
            reason = f"rank {rank} is at step {answers[rank].step}, not ready, while step {target - 1} was committed"
            return self._end(Restart(3, reason))
        if any(self._mirrored.get(rank) != target for rank in self._stranded()):
            return self._go_back(target, f"no survivor holds the state of rank {self._stranded()[0]}")
        forward = [rank for rank, answer in answers.items() if answer.step == target - 1]
        return self._settle(target, "roll_forward" if forward else "void")

    def _go_back(self, target: int, reason: str) -> list[Action]:
        """To the last mirror due at a committed step: a step is committed when all have it, and each keeps two."""
        back = last_due(target - 1, self._mirror_every)
        if back is None:
            return self._end(Restart(3, f"{reason}, and the first mirror is not yet due at step {target}"))
        self._back_to, self._ended = back, set(self.whole)
        return [End(rank) for rank in sorted(self.whole)] if self.whole else self._settle(back, "back")

    def _settle(self, target: int, kind: str) -> list[Action]:
        self.step = target
        self.state = State.SETTLING
        self.decision = Decision(self.generation, target, sorted(self.whole), sorted(self.pending))
        details: dict[str, object] = {"step": target, "decision": kind}
        stranded = self._stranded()
        if stranded:
            details |= {"rung": 2, "reason": f"rank {stranded[0]} goes on from its mirror of step {target}"}
        return [
            Reached(self.generation, "frozen", details),
            Broadcast(self.decision),
            Deadline(self.generation, self.state.value, "join_timeout"),
        ]

    def _published(self) -> list[Action]:
        return (
            [Reached(self.generation, "published"), *self._settled()] if self.state is State.SETTLING else []
        )

    def _arrived(self) -> list[Action]:
        return [Reached(self.generation, "arrived"), *self._settled()] if self.state is State.SETTLING else []

    def _settled(self) -> list[Action]:
        published = self._reports.get(Stage.PUBLISHED, {})
        if not (
            self.whole <= published.keys() and self.pending <= self._reports.get(Stage.ARRIVED, {}).keys()
        ):
            return []
        self.state = State.RESTORING
        return [
            Broadcast(Restore(self.generation, {rank: published[rank] for rank in sorted(self.whole)})),
            Deadline(self.generation, self.state.value, "join_timeout"),
        ]

    def _restored(self) -> list[Action]:
        if self.state is not State.RESTORING:
            return []
        self.state = State.REBUILDING
        self.whole |= self.pending
        self.pending, self._back_to = set(), None
        return [
            Reached(self.generation, "restored"),
            Broadcast(Rebuild(self.generation, sorted(self.lost | self.left))),
            Deadline(self.generation, self.state.value, "settle_timeout"),
        ]

    def _rebuilt(self) -> list[Action]:
        if self.state is not State.REBUILDING:
            return []
        details: dict[str, object] = {"reports": dict(self._reports[Stage.REBUILT])}
        self.state = State.RUNNING
        self.lost, self.left, self.resumed, self.decision = set(), set(), True, None
        self._ran_in = self.generation
        self._reports = {}
        return [Reached(self.generation, "resumed", details), Broadcast(Resume(self.generation))]

    def _unfit(self, event: Unfit) -> list[Action]:
        if event.rank in self._ended:
            return []
        if self._mirror_every and event.rank in self.whole and self.state in (State.FREEZING, State.SETTLING):
            self.state = State.FREEZING
            return self._go_back(self.step, f"rank {event.rank} cannot recover live: {event.reason}")
        return self._end(Restart(3, f"rank {event.rank} cannot recover live: {event.reason}"))

    def _overdue(self, event: Overdue) -> list[Action]:
        if (event.generation, event.state) != (self.generation, self.state.value):
            return []
        missing = sorted(self._missing())
        return self._end(Restart(4, f"ranks {missing} did not come out of state {self.state.value} in time"))

    def _missing(self) -> set[int]:
        if self.state is State.FREEZING:
            return self.whole - self._frozen.keys()
        if self.state is State.SETTLING:
            here = self._reports.get(Stage.PUBLISHED, {}).keys() | self._reports.get(Stage.ARRIVED, {}).keys()
            return set(self.ranks) - here
        stage = Stage.RESTORED if self.state is State.RESTORING else Stage.REBUILT
        return self._expected(stage) - self._reports.get(stage, {}).keys()

    def _nothing(self, event: Event) -> list[Action]:
        return []


def _disagreement(key: str, ranks: frozenset[int], digests: dict[int, int]) -> str:
    """Why these ranks are not replicas of one piece; empty if they are."""
    first = min(digests)
    for rank in sorted(ranks):
        if rank not in digests:
            return f"{key} of rank {first} should be the same on rank {rank}, which has no such state"
        if digests[rank] != digests[first]:
            return f"{key} differs between ranks {first} and {rank}, so they are no replicas"
    return ""


COMPLETED: dict[Stage, Callable[[Coordinator], list[Action]]] = {
    Stage.READY: Coordinator._commit,
    Stage.FINISHED: Coordinator._finish,
    Stage.PUBLISHED: Coordinator._published,
    Stage.ARRIVED: Coordinator._arrived,
    Stage.RESTORED: Coordinator._restored,
    Stage.REBUILT: Coordinator._rebuilt,
}

_Handler = Callable[[Coordinator, Event], list[Action]]

_RECOVERING = (State.FREEZING, State.SETTLING, State.RESTORING, State.REBUILDING)


def _table() -> dict[tuple[State, type[Event]], _Handler]:
    rows: dict[tuple[State, type[Event]], Callable[..., list[Action]]] = {}
    for state in State:
        ended = state is State.ENDED
        rows[state, Tally] = Coordinator._nothing if ended else Coordinator._tally
        rows[state, Lost] = Coordinator._nothing if ended else Coordinator._lost
        rows[state, ExitedEarly] = Coordinator._nothing if ended else Coordinator._exited_early
        rows[state, Unfit] = Coordinator._nothing if ended else Coordinator._unfit
        rows[state, Overdue] = Coordinator._overdue if state in _RECOVERING else Coordinator._nothing
        rows[state, AllFrozen] = Coordinator._all_frozen if state is State.FREEZING else Coordinator._nothing
        waits = (
            state in _RECOVERING and state is not State.REBUILDING
        )  # nobody waits for a peer any more there
        rows[state, LeftEarly] = Coordinator._left_early if waits else Coordinator._nothing
    return rows


TABLE = _table()
