"""The coordinator: decides for the job. Every state and transition stands in TABLE, at the end.

The rule: a step is committed when every rank was ready for it, and in no other way; a recovery takes every rank to one
and the same step. Terms: ``whole`` ranks hold the state of their step; ``pending`` ranks are replacements that do not
yet; ``lost`` ranks are those lost since the job last ran (their groups are void until it runs again).

``handle(event)`` returns actions and changes this object; it does no input or output and reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.between import RollCall
from checkpointless_elastic.protocol.checks import published
from checkpointless_elastic.protocol.comparing import Comparing
from checkpointless_elastic.protocol.events import (
    Action,
    AllFrozen,
    Broadcast,
    Chosen,
    Counted,
    Deadline,
    End,
    Event,
    ExitedEarly,
    Late,
    LeftEarly,
    Lost,
    NodeLost,
    Opened,
    Overdue,
    Reached,
    Reopened,
    Replace,
    Resize,
    Restart,
    Stop,
    Succeed,
    Tally,
    Unfit,
)
from checkpointless_elastic.protocol.halt import Halt
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Rebuild,
    Release,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.pace import Paces
from checkpointless_elastic.protocol.rungs import Choice, Facts, Rung, choose
from checkpointless_elastic.protocol.states import State

__all__ = ["TABLE", "Coordinator", "State"]


class Coordinator(Comparing):
    """Decides for one run of the script by ``ranks``, which keep mirrors of every ``mirror_every``-th step (0: none).

    A lost rank without a live twin takes its state from its mirror, if that is of the step at which all go on. If it is
    older, all go back to it: the survivors are ended too, and every rank goes on from its mirror. ``began``: see
    `rungs.Facts`.

    Attributes:
        step: the step that is committed next; 0 before the first commit.
        store: where workers meet, see Decision.
        released: all ranks have finished.
        paces: which ranks are slow.
        ended: ranks whose workers were ended and are not yet gone.
        blamed: ranks whose faults have struck since the last committed step, the first one first.
    """

    def __init__(
        self,
        ranks: frozenset[int],
        max_faults_per_step: int,
        generation: int = 0,
        mirror_every: int = 0,
        began: int = 0,
    ) -> None:
        super().__init__(ranks, max_faults_per_step, generation, mirror_every, began)
        self.decision: Decision | None = None  # in force in a recovery, for workers that connect late
        self.resumed = False  # a recovery has ended and its first step is not yet committed
        self._back: Choice | None = None  # all ranks go back to their mirrors
        self._calls = 0  # number of the newest roll call ...
        self._called: State | None = None  # ... and, in this generation, in which state it was made
        self._untold: set[int] = set()  # ranks that left, of which the last Freeze did not say so
        self._unanswered: set[int] = set()  # ranks that have not answered it
        self._halt = Halt()
        self.paces = Paces()

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
        if event.stage is Stage.PRESENT and (event.step, self.state) != (self._calls, self._called):
            return []
        if event.stage is Stage.READY and event.step != self.step:
            raise ProtocolError(
                f"Ranks {sorted(event.reports)} are ready for step {event.step}, not {self.step}."
            )
        reports.update(event.reports)
        if len(reports) < len(self._expected(event.stage)):  # most tallies are not the last one
            return []
        return COMPLETED[event.stage](self) if self._expected(event.stage) <= reports.keys() else []

    def _commit(self) -> list[Action]:
        if self.state is not State.RUNNING or self.ended:
            return []
        told = self._judge(self._reports.pop(Stage.READY))
        if self.ended or self.state is not State.RUNNING:
            return told
        commit = Commit(self.generation, self.step)
        self._advanced(self.step + 1)
        actions = [*told, Broadcast(commit)]
        if self.resumed:
            self.resumed = False
            actions.append(Reached(self.generation, "committed", {"step": commit.step}))
        return actions

    def _counted(self, event: Counted) -> list[Action]:
        if event.generation != self._ran_in or event.step <= self.step:
            return []
        if self.state is State.RUNNING:
            self._advanced(event.step)
        else:  # the fault that is being answered came before it was seen
            self.step = event.step
        return []

    def _advanced(self, step: int) -> None:
        self.step = step
        self._faults_since_commit = self._endings = 0
        self.blamed = {}

    def _finish(self) -> list[Action]:
        self.state, self.released = State.ENDED, True
        return [Broadcast(Release(self.generation)), Succeed()]

    def _exited_early(self, event: ExitedEarly) -> list[Action]:
        self.exited.add(event.rank)
        finished = self._reports.get(Stage.FINISHED, {}).keys()
        return self._finish() if self._expected(Stage.FINISHED) <= finished else []

    # ---- a fault

    def _lost(self, event: Lost) -> list[Action]:
        joining, error = event.rank in self.pending, ""
        if event.rank not in self.ended:
            self._faults_since_commit += 1
            self._blame([event.rank])
            error = self._repeated(event)
        self._mirrored[event.rank] = event.mirrored
        newly = self._remove({event.rank}, f"rank {event.rank} {event.cause}")
        facts = replace(self._facts({event.rank}), error=error, joining=joining)
        return self._answer(facts, event.cause, newly)

    def _node_lost(self, event: NodeLost) -> list[Action]:
        """Its ranks are started by whoever takes the node's place."""
        self._faults_since_commit += 1
        self._blame(sorted(event.ranks))
        self._mirrored.update(dict.fromkeys(event.ranks, -1))
        newly = self._remove(event.ranks, f"node {event.node} {event.cause}")
        return self._answer(self._facts(event.ranks), event.cause, newly - event.ranks)

    def _reopened(self, event: Reopened) -> list[Action]:
        ended_well = self._remove(set(), event.cause)
        return self._answer(self._facts(), event.cause, ended_well)

    def _answer(self, facts: Facts, cause: str, replaced: set[int]) -> list[Action]:
        """``replaced``: ranks whose agents are told to start them again."""
        choice = choose(facts)
        if not choice.goes_on:
            return self._end(choice)
        actions = [*map(Replace, sorted(replaced)), *self._open(cause), self._chosen(facts, choice)]
        return actions if self.whole else actions + self._decide()

    def _chosen(self, facts: Facts, choice: Choice) -> Chosen:
        return Chosen(self.generation, self.step, facts.what, choice.rung, choice.reason, choice.ends)

    def _end(self, choice: Choice) -> list[Action]:
        self.state = State.ENDED
        stops = choice.rung is Rung.STOP
        return [Stop(choice.reason, choice.ranks) if stops else Restart(choice.rung, choice.reason)]

    def _open(self, cause: str) -> list[Action]:
        self.generation += 1
        self.state = State.FREEZING
        self.resumed = False
        self.decision, self._called = None, None
        self._frozen = {}
        self._reports = {}
        self._untold, self._unanswered = set(), set()
        return [
            Opened(self.generation, frozenset(self.lost), cause),
            Broadcast(self.freeze()),
            self._deadline(),
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
        self._keeps(event.mirrored)
        known = self.whole <= self._frozen.keys() - self.ended  # a rank that was ended must not be a source
        return self._answered(event) + (self._decide() if known else [])

    def _decide(self) -> list[Action]:
        if self._back is not None and self.whole:
            return []
        if self._back is not None:
            chosen = self._chosen(self._facts(), replace(self._back, ends=frozenset()))
            return [chosen, *self._settle(self._back, "back")]
        answers = {rank: self._frozen[rank] for rank in self.whole}
        facts = replace(self._facts(), answers=answers)
        choice = choose(facts)
        if not choice.goes_on:
            return self._end(choice)
        if self.resizing and not choice.back:
            choice = replace(choice, rung=Rung.RERUN, reason=self.resizing)
        chosen = self._chosen(facts, choice)
        if choice.back:
            return [chosen, *self._go_back(choice)]
        forward = any(answer.step < choice.step for answer in answers.values())
        return [chosen, *self._settle(choice, "roll_forward" if forward else "void")]

    def _go_back(self, choice: Choice) -> list[Action]:
        """All go on from their mirrors."""
        self._back, self.resizing = choice, ""
        return self._end_ranks(choice) if choice.ends else self._settle(choice, "back")

    def _end_ranks(self, choice: Choice) -> list[Action]:
        self.ended |= choice.ends
        self._endings += 1
        return [*(End(rank, "was ended") for rank in sorted(choice.ends)), self._deadline()]

    def _settle(self, choice: Choice, kind: str) -> list[Action]:
        self.step = choice.step
        self.state = State.SETTLING
        self.decision = Decision(
            self.generation,
            choice.step,
            sorted(self.whole),
            sorted(self.pending),
            self.store,
            list(self._stranded()) if choice.rung is Rung.MIRROR else [],
            bool(self.resizing),
        )
        return [
            Reached(self.generation, "frozen", {"step": choice.step, "decision": kind}),
            Broadcast(self.decision),
            self._deadline(),
        ]

    def _published(self, point: str = "published") -> list[Action]:
        here: list[Action] = [Reached(self.generation, point)] if self.state is State.SETTLING else []
        return here + self._settled()

    def _settled(self) -> list[Action]:
        if self.state is not State.SETTLING or self.ended:
            return []
        said, arrived = (self._reports.get(stage, {}) for stage in (Stage.PUBLISHED, Stage.ARRIVED))
        if self.resizing:
            return self._left_behind(said)
        if not (self.whole <= said.keys() and self.pending <= arrived.keys()):
            return []
        self.state = State.RESTORING
        if not self.pending:  # nobody was lost: the coordinator was, or a connection
            return self._restored()
        return [
            Broadcast(
                Restore(
                    self.generation, {rank: published(said[rank]).publication for rank in sorted(self.whole)}
                )
            ),
            self._deadline(),
        ]

    def _restored(self) -> list[Action]:
        if self.state is not State.RESTORING:
            return []
        self.state = State.REBUILDING
        self.whole |= self.pending
        self.pending, self._back = set(), None
        return [
            Reached(self.generation, "restored"),
            Broadcast(Rebuild(self.generation, sorted(self.lost | self.left))),
            self._deadline(),
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

    def _halted(self, event: Late) -> list[Action]:
        if (event.generation, event.step) != (self.generation, self.step) or self._unprotected:
            return []
        halt, running = self._halt, self.state is State.RUNNING  # a recovery has its own deadlines
        found = halt.heard(event, frozenset(self.whole - self.exited), running)
        if halt.stands and running and not found:
            reason = f"all ranks have stood for longer than hang_timeout, and {halt.cause}"
            return self._end(Choice(Rung.RESTART, reason))
        if halt.votes_lost and running:
            self._halt = Halt()
            self._faults_since_commit += 1
            return self._reopened(
                Reopened("all ranks were ready for a minute, and not all of their votes came")
            )
        ends = [End(rank, reason, seconds) for rank, (reason, seconds) in sorted(found.items())]
        return [*halt.told, *ends]

    def _unfit(self, event: Unfit) -> list[Action]:
        if event.rank in self.ended:
            return []
        leaving = self.state in (State.FREEZING, State.SETTLING)
        what = f"rank {event.rank} cannot recover live: {event.reason}"
        self.kept = -1  # it may be what this rank could not take up
        facts = replace(self._facts({event.rank}), what=what, unfit=True, leaving=leaving)
        choice = choose(facts)
        if not choice.goes_on:
            return self._end(choice)
        self.state = State.FREEZING
        return [self._chosen(facts, choice), *self._go_back(choice)]

    def _overdue(self, event: Overdue) -> list[Action]:
        if (event.generation, event.state) != (self.generation, self.state.value):
            return []
        if self._endings or self._called is self.state:
            return self._late(self._missing() | self.ended)
        self._calls, self._called = self._calls + 1, self.state
        self._reports.pop(Stage.PRESENT, None)
        return [Broadcast(RollCall(self.generation, self._calls, self.state.value)), self._deadline()]

    def _present(self) -> list[Action]:
        """The agents of all that are missing have said which of their ranks are."""
        said = self._reports[Stage.PRESENT]
        missing = {rank for rank in self._missing() if not said[rank]}
        self._blame(sorted(missing))
        return self._late(missing) if missing else []

    def _late(self, missing: set[int]) -> list[Action]:
        self._calls += 1  # what else is answered to the last one comes too late
        self.ended |= missing
        what = f"ranks {sorted(missing)} did not come out of state {self.state.value} in time"
        facts = replace(self._facts(missing), what=what, overdue=True)
        choice = choose(facts)
        if not choice.goes_on:
            return self._end(choice)
        return [self._chosen(facts, choice), *self._end_ranks(choice)]

    def _deadline(self) -> Deadline:
        joins = self.state in (State.SETTLING, State.RESTORING)
        return Deadline(self.generation, self.state.value, "join_timeout" if joins else "settle_timeout")

    def _nothing(self, event: Event) -> list[Action]:
        return []


COMPLETED: dict[Stage, Callable[[Coordinator], list[Action]]] = {
    Stage.READY: Coordinator._commit,
    Stage.FINISHED: Coordinator._finish,
    Stage.PUBLISHED: Coordinator._compared,
    Stage.ARRIVED: lambda it: it._published("arrived"),
    Stage.RESTORED: Coordinator._restored,
    Stage.REBUILT: Coordinator._rebuilt,
    Stage.PRESENT: Coordinator._present,
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
        rows[state, Resize] = Coordinator._nothing if ended else Coordinator._resize
        rows[state, ExitedEarly] = Coordinator._nothing if ended else Coordinator._exited_early
        rows[state, Late] = Coordinator._nothing if ended else Coordinator._halted
        rows[state, Unfit] = Coordinator._nothing if ended else Coordinator._unfit
        rows[state, Overdue] = Coordinator._overdue if state in _RECOVERING else Coordinator._nothing
        waits = state in _RECOVERING and state is not State.REBUILDING  # nobody waits for a peer there
        answered = Coordinator._answered if waits else Coordinator._nothing
        runs = state in (State.RUNNING, State.FREEZING)
        rows[state, Counted] = Coordinator._counted if runs else Coordinator._nothing
        rows[state, AllFrozen] = Coordinator._all_frozen if state is State.FREEZING else answered
        rows[state, LeftEarly] = Coordinator._left_early if waits else Coordinator._nothing
    return rows


TABLE = _table()
