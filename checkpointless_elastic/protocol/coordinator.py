"""The coordinator: decides for the job. Every state and transition stands in TABLE, at the end.

The rule: a step is committed when every rank was ready for it, and in no other way; a recovery takes every rank to one
and the same step. Terms: ``whole`` ranks hold the state of their step; ``pending`` ranks are replacements that do not
yet; ``lost`` ranks are those lost since the job last ran (their groups are void until it runs again).

``handle(event)`` returns actions and changes this object; it does no input or output and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.between import Standing
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
    NodeLost,
    Opened,
    Overdue,
    Reached,
    Reopened,
    Replace,
    Restart,
    Stop,
    Succeed,
    Tally,
    Unfit,
)
from checkpointless_elastic.protocol.holdings import Holdings
from checkpointless_elastic.protocol.judging import Judging
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Frozen,
    Phase,
    Rebuild,
    Release,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.mirrors import last_due
from checkpointless_elastic.protocol.states import State

__all__ = ["TABLE", "Coordinator", "State"]


class Coordinator(Judging):
    """Decides for one run of the script by ``ranks``, which keep mirrors of every ``mirror_every``-th step (0: none).

    A lost rank without a live twin takes its state from its mirror, if that is of the step at which all go on. If it is
    older, all go back to it: the survivors are ended too, and every rank goes on from its mirror.

    Attributes:
        step: the step that is committed next; 0 before the first commit.
        store: where workers meet, see Decision.
        released: all ranks have finished.
    """

    def __init__(
        self, ranks: frozenset[int], max_faults_per_step: int, generation: int = 0, mirror_every: int = 0
    ) -> None:
        self.ranks = ranks
        self.generation = self._ran_in = generation  # now, and when the job last ran
        self.state = State.RUNNING
        self.released = False
        self.step = 0
        self.store = ""
        self._store_lost = False  # since the job last ran
        self.whole = set(ranks)
        self.pending: set[int] = set()
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self.exited: set[int] = set()
        self.decision: Decision | None = None  # in force in a recovery, for workers that connect late
        self.resumed = False  # a recovery has ended and its first step is not yet committed
        self._max_faults = max_faults_per_step
        self._faults_since_commit = 0
        self._errors: dict[int, tuple[int, str]] = {}
        self._unprotected: set[int] = set(ranks)
        self.holdings = Holdings(ranks)
        self._mirror_every = mirror_every
        self._mirrored: dict[int, int] = {}  # of lost ranks, the step of their newest mirror
        self._back_to: int | None = None  # the step to which all ranks go back
        self._ended: set[int] = set()  # ranks that were ended, for it or by `_judge`, and are not yet gone
        self._frozen: dict[int, Frozen] = {}
        self._untold: set[int] = set()  # ranks that left, of which the last Freeze did not say so
        self._unanswered: set[int] = set()  # ranks that have not answered it
        self._reports: dict[Stage, dict[int, bytes]] = {}

    def take_over(self, standings: Iterable[Standing], store: str) -> None:
        """Know what the last coordinator knew, as far as agents can tell. NodeLost or Reopened comes next.

        ``store``: where workers meet from now on, since the last one was lost with the last coordinator.
        """
        self.store, self._store_lost = store, True
        for standing in standings:
            self.step = max(self.step, standing.step)
            self.pending |= set(standing.pending)
            self.lost |= set(standing.lost) | set(standing.pending)
            self.left |= set(standing.left)
            self.exited |= set(standing.gone)
            self._unprotected -= set(standing.protected)
            self.holdings.held |= standing.held
            self.released |= standing.released
        self.whole -= self.pending
        self._ran_in = self.generation - 1 if self.lost else self.generation
        if self.step and self.holdings.held:
            # those that said nothing had made a Run too, or this step was not reached
            self._unprotected &= self.holdings.held.keys()
            self.holdings.find_twins()

    def protect(self, rank: int) -> None:
        """This rank's script has made a Run."""
        self._unprotected.discard(rank)

    @property
    def protected(self) -> bool:
        """Can a loss be answered by rung 1, as far as is known now?"""
        return self.step > 0 and not self._unprotected and not self.holdings.distrust

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
        if event.stage is Stage.READY and event.step < self.step:
            return []  # said twice, when an agent moved in the tree
        if event.stage is Stage.READY and event.step != self.step:
            raise ProtocolError(
                f"Ranks {sorted(event.reports)} are ready for step {event.step}, not {self.step}."
            )
        reports.update(event.reports)
        if len(reports) < len(self._expected(event.stage)):  # most tallies are not the last one
            return []
        return COMPLETED[event.stage](self) if self._expected(event.stage) <= reports.keys() else []

    def _expected(self, stage: Stage) -> Set[int]:
        if stage is Stage.PUBLISHED:
            return self.whole
        if stage in (Stage.ARRIVED, Stage.RESTORED):
            return self.pending
        return self.ranks - self.exited if stage is Stage.FINISHED else self.ranks

    def _commit(self) -> list[Action]:
        if self.state is not State.RUNNING or self._ended:
            return []
        told = self._judge(self._reports.pop(Stage.READY))
        if self._ended or self.state is not State.RUNNING:
            return told
        commit = Commit(self.generation, self.step)
        self.step += 1
        self._faults_since_commit = 0
        actions = [*told, Broadcast(commit)]
        if self.resumed:
            self.resumed = False
            actions.append(Reached(self.generation, "committed", {"step": commit.step}))
        return actions

    def _finish(self) -> list[Action]:
        self.state, self.released = State.ENDED, True
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
        self._mirrored[event.rank] = event.mirrored
        replaced = sorted({event.rank} | self.exited)
        actions = self._without({event.rank}, event.cause, f"rank {event.rank} {event.cause}")
        return actions if self.state is State.ENDED else [*map(Replace, replaced), *actions]

    def _node_lost(self, event: NodeLost) -> list[Action]:
        """Its ranks are started by whoever takes the node's place."""
        stop = self._too_many(tuple(sorted(event.ranks)))
        if stop:
            return self._end(stop)
        self._mirrored.update(dict.fromkeys(event.ranks, -1))
        replaced = sorted(self.exited - event.ranks)
        actions = self._without(set(event.ranks), event.cause, f"node {event.node} {event.cause}")
        return actions if self.state is State.ENDED else [*map(Replace, replaced), *actions]

    def _reopened(self, event: Reopened) -> list[Action]:
        if not self.protected:
            return self._end(Restart(3, event.cause))
        return self._open(event.cause)

    def _without(self, ranks: set[int], cause: str, sentence: str) -> list[Action]:
        newly = ranks | self.exited
        self.exited = set()
        self._ended -= newly
        self.lost |= newly
        self.whole -= newly
        self.pending |= newly
        if not self.protected:
            return self._end(Restart(3, self._why_not_live(sentence)))
        stranded = self._stranded()
        if stranded and not self._mirror_every:
            return self._end(Restart(3, f"no survivor holds the state of rank {stranded[0]}"))
        actions = self._open(cause)
        return actions if self.whole else actions + self._decide()

    def _stranded(self) -> list[int]:
        """Lost ranks of which no live rank holds all that they held."""
        return [rank for rank in sorted(self.pending) if not self.holdings.twins(rank) & self.whole]

    def _why_not_live(self, sentence: str) -> str:
        if self.holdings.distrust:
            return f"{sentence}, and {self.holdings.distrust}"
        if self._unprotected:
            return f"{sentence}, and the script of rank {min(self._unprotected)} has made no Run"
        return f"{sentence} before the first step was committed"

    def _repeated(self, event: Lost) -> Action | None:
        failure = (self.step, event.error)
        if event.error and self._errors.get(event.rank) == failure:
            reason = f"rank {event.rank} failed twice at step {self.step} with the same error: {event.error}"
            return Restart(3, reason) if event.rank in self.pending else Stop(reason, (event.rank,))
        if event.error:
            self._errors[event.rank] = failure
        return self._too_many((event.rank,))

    def _too_many(self, ranks: tuple[int, ...]) -> Action | None:
        self._faults_since_commit += 1
        if self._faults_since_commit <= self._max_faults:
            return None
        faults = f"{self._faults_since_commit} faults at step {self.step}"
        return Stop(f"{faults} without a committed step between them", ranks)

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
        self._untold, self._unanswered = set(), set()
        return [
            Opened(self.generation, frozenset(self.lost), cause),
            Broadcast(self.freeze()),
            Deadline(self.generation, self.state.value, "settle_timeout"),
        ]

    def freeze(self) -> Freeze:
        """The Freeze in force, for agents that come late."""
        return Freeze(self.generation, sorted(self.lost), sorted(self.left), self._store_lost)

    def _left_early(self, event: LeftEarly) -> list[Action]:
        if event.generation <= self._ran_in or event.rank in self.left or event.rank not in self.whole:
            return []  # of a recovery that has ended, or of a worker that is gone
        self.left.add(event.rank)
        self._untold.add(event.rank)
        return self._tell_left()

    def _tell_left(self) -> list[Action]:
        """One Freeze is under way at a time: many ranks leave at once, and all hear of them together."""
        if self._unanswered or not self._untold:
            return []
        self._untold, self._unanswered = set(), set(self.whole)
        return [Broadcast(self.freeze())]

    def _answered(self, event: AllFrozen) -> list[Action]:
        """Answers to a Freeze that was sent again."""
        if event.generation != self.generation:
            return []
        self._unanswered -= event.reports.keys()
        return self._tell_left()

    def _all_frozen(self, event: AllFrozen) -> list[Action]:
        if event.generation != self.generation:
            return []
        self._frozen.update(event.reports)
        known = self.whole <= self._frozen.keys() - self._ended  # a rank that was ended must not be a source
        return self._answered(event) + (self._decide() if known else [])

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
        self.decision = Decision(
            self.generation, target, sorted(self.whole), sorted(self.pending), self.store
        )
        details: dict[str, object] = {"step": target, "decision": kind}
        stranded = self._stranded()
        if stranded:
            details |= {"rung": 2, "reason": f"rank {stranded[0]} goes on from its mirror of step {target}"}
        return [
            Reached(self.generation, "frozen", details),
            Broadcast(self.decision),
            Deadline(self.generation, self.state.value, "join_timeout"),
        ]

    def _published(self, point: str = "published") -> list[Action]:
        here: list[Action] = [Reached(self.generation, point)] if self.state is State.SETTLING else []
        return here + self._settled()

    def _settled(self) -> list[Action]:
        if self.state is not State.SETTLING:
            return []
        published, arrived = (self._reports.get(stage, {}) for stage in (Stage.PUBLISHED, Stage.ARRIVED))
        if not (self.whole <= published.keys() and self.pending <= arrived.keys()):
            return []
        self.state = State.RESTORING
        if not self.pending:  # nobody was lost: the coordinator was, or a connection
            return self._restored()
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
        self._store_lost = False
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
        if self.state is State.RUNNING:
            return self._ended
        if self.state is State.FREEZING:
            return self.whole - (self._frozen.keys() - self._ended)
        if self.state is State.SETTLING:
            here = self._reports.get(Stage.PUBLISHED, {}).keys() | self._reports.get(Stage.ARRIVED, {}).keys()
            return set(self.ranks) - here
        stage = Stage.RESTORED if self.state is State.RESTORING else Stage.REBUILT
        return set(self._expected(stage)) - self._reports.get(stage, {}).keys()

    def _nothing(self, event: Event) -> list[Action]:
        return []


COMPLETED: dict[Stage, Callable[[Coordinator], list[Action]]] = {
    Stage.READY: Coordinator._commit,
    Stage.FINISHED: Coordinator._finish,
    Stage.PUBLISHED: Coordinator._published,
    Stage.ARRIVED: lambda it: it._published("arrived"),
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
        rows[state, NodeLost] = Coordinator._nothing if ended else Coordinator._node_lost
        rows[state, Reopened] = Coordinator._nothing if ended else Coordinator._reopened
        rows[state, ExitedEarly] = Coordinator._nothing if ended else Coordinator._exited_early
        rows[state, Unfit] = Coordinator._nothing if ended else Coordinator._unfit
        rows[state, Overdue] = Coordinator._nothing if ended else Coordinator._overdue
        waits = state in _RECOVERING and state is not State.REBUILDING  # nobody waits for a peer there
        answered = Coordinator._answered if waits else Coordinator._nothing
        rows[state, AllFrozen] = Coordinator._all_frozen if state is State.FREEZING else answered
        rows[state, LeftEarly] = Coordinator._left_early if waits else Coordinator._nothing
    return rows


TABLE = _table()
