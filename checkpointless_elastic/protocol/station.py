"""An agent's seat: what its ranks reached and said, and what the coordinator ordered, as far as other agents need it.

Turns a worker's messages into those to the coordinator; those of several ranks are gathered into one per stage. It is
also what a new coordinator is told when the last one is gone (`standing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from checkpointless_elastic.protocol.between import (
    Among,
    Answers,
    Between,
    Gathered,
    NodeEnded,
    Ordered,
    RankExited,
    RankGone,
    RankSays,
    Reseated,
    RollCall,
    RunAgain,
    Seated,
    Standing,
)
from checkpointless_elastic.protocol.events import Tally
from checkpointless_elastic.protocol.layout import ranks
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    FromWorker,
    Frozen,
    Hold,
    Left,
    Mismatch,
    Protected,
    Rebuild,
    Release,
    Replicas,
    Report,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.node import Node
from checkpointless_elastic.protocol.states import State

__all__ = ["Station"]


class Station:
    """One run of the script in one seat. ``voted()``: the steps that its ranks have committed among themselves.

    Attributes:
        seat: what the coordinator said.
        ranks: of this seat.
        guardian: its address; empty while that seat is vacant.
        generation: of the membership in force.
        decision: in force while a recovery goes on, for workers that connect late.
        pending: ranks that are replacements and have not joined.
        gone: exit codes of workers that are gone and were not replaced.
        released: all ranks of the job have finished.
        store: where workers meet now.
        keepers: its ranks whose kept state is on this node, see `resize`.
        stopped: nothing counts any more: the script is run again, or the job ends.
    """

    def __init__(self, seat: Seated, voted: Callable[[], int] = lambda: 0) -> None:
        self.seat = seat
        self.ranks = frozenset(ranks(seat.seat, seat.bases, seat.world))
        self.guardian = seat.guardian
        self.generation = seat.generation
        self._step = max(0, seat.kept)
        self._voted = voted
        self.keepers: frozenset[int] = frozenset()
        self.decision: Decision | None = None
        self.pending: set[int] = set(self.ranks) if seat.taken else set()
        self.gone: dict[int, int] = {}
        self.released = False
        self.store = seat.store
        self.stopped = False
        self._ran = 0 if seat.taken else seat.generation
        self._absent: set[int] = set()  # its ranks that are gone and not yet replaced
        self._lost: set[int] = set(self.pending)
        self._left: set[int] = set()
        # what its ranks said in this recovery: the coordinator that was told may be lost before it acts on it
        self._leavers: set[int] = set()
        self._unfit: dict[int, str] = {}
        self._protected: set[int] = set()
        self._held: dict[int, Replicas] = {}
        self._gone_wards: dict[int, int] = {}  # ranks of the seat before: the generation of their newest loss
        self._node = Node(self.ranks, seat.generation, self._wards())
        if seat.taken:
            self._node.opened(seat.generation, self.ranks)

    def _wards(self) -> frozenset[int]:
        """The ranks of the seat before this one: their private state is kept here."""
        seats = len(self.seat.bases)
        before = (self.seat.seat - 1) % seats
        if before == self.seat.seat:
            return frozenset()
        return frozenset(ranks(before, self.seat.bases, self.seat.world))

    @property
    def step(self) -> int:
        """The next step to be committed, as far as is known here."""
        return max(self._step, self._voted())

    @property
    def recovering(self) -> bool:
        """Does a recovery go on?"""
        return bool(self._lost or self._left) or self.decision is not None

    @property
    def running(self) -> frozenset[int]:
        """Its ranks whose script has made a Run, that have joined and are not known to be gone."""
        if self.stopped or self.released:
            return frozenset()
        here = self.ranks - self.pending - self._absent - self.gone.keys()
        return here & self._protected

    def is_protected(self, rank: int) -> bool:
        """Can the loss of this rank be answered by rung 1, as far as is known here?"""
        return rank in self._protected and (self.step > max(0, self.seat.kept) or self.seat.taken)

    @property
    def fresh(self) -> bool:
        """This run of the script began with kept state, and nothing was committed since."""
        return self.step == self.seat.kept

    # ---- up

    def said(self, rank: int, message: FromWorker) -> Between | None:
        """What the coordinator is told of a worker's message; None: nothing now."""
        if isinstance(message, Report):
            return _gathered(self._node.report(rank, message))
        if isinstance(message, Frozen):
            answers = self._node.frozen(rank, message)
            return None if answers is None else Answers(answers.generation, answers.reports)
        if isinstance(message, Protected):
            self._protected.add(rank)
        if isinstance(message, Replicas):
            self._held[rank] = message
        if isinstance(message, Left) and message.generation > self._ran:
            self._leavers.add(rank)
        if isinstance(message, Mismatch):
            self._unfit[rank] = message.reason
        return RankSays(rank, message) if isinstance(message, (Protected, Replicas, Left, Mismatch)) else None

    def counted(self) -> Among | None:
        """What the coordinator is to know, before anything else, of steps that ranks have committed; None: nothing."""
        if self.step == self._step:
            return None
        self._step = self.step
        return Among(self._ran, self._step)

    def recall(self, held: Mapping[int, Replicas]) -> None:
        """What ranks of a taken seat said to the agent that had it before."""
        self._held.update(held)

    def keeps(self, rank: int, generation: int) -> bool:
        """Is a copy of this generation still a ward's? An agent that lost that seat may not know it."""
        return generation >= self._gone_wards.get(rank, 0)

    def copied(self, rank: int, generation: int, step: int) -> Between | None:
        """The private state that a ward had when it was ready for this step is kept here."""
        return _gathered(self._node.copied(rank, generation, step))

    def lost(self, rank: int, cause: str, error: str, mirrored: int) -> RankGone:
        """A worker is gone; see `events.Lost`."""
        self._absent.add(rank)
        self._leavers.discard(rank)
        self._unfit.pop(rank, None)
        return RankGone(rank, cause, error, mirrored)

    def exited(self, rank: int) -> RankExited:
        """A worker ended well without waiting."""
        self._absent.add(rank)
        return RankExited(rank, _gathered(self._node.exited(rank)))

    def present(self, call: RollCall) -> Gathered | None:
        """The answer to the coordinator's roll call."""
        if call.generation != self.generation:
            return None
        here = self._node.present(State(call.state))
        said = {rank: b"here" if rank in here else b"" for rank in self.ranks}
        return Gathered(Stage.PRESENT, call.generation, call.number, said)

    def ended(self) -> NodeEnded | None:
        """What is to be said once the job was released, or nothing is left to wait for; None: not yet."""
        bad = self._bad()
        return None if bad is None else NodeEnded(self.seat.seat, self.seat.restarts, bad)

    def _bad(self) -> dict[int, int] | None:
        bad = {rank: code for rank, code in self.gone.items() if code}
        return bad if self.released and (bad or self.gone.keys() >= self.ranks) else None

    def standing(self) -> Standing:
        """What a new coordinator must know."""
        return Standing(
            self.seat.seat,
            self.generation,
            self.seat.generation,
            self._ran,
            self.guardian,
            self.step,
            self.seat.restarts,
            sorted(self.pending),
            sorted(self._lost),
            sorted(self._left | self._leavers),
            sorted(self._absent),
            sorted(self._protected),
            self._held,
            self.released,
            self._bad(),
            self.seat.resizes,
            self.seat.kept,
            sorted(self.keepers),
            self._unfit,
        )

    # ---- down

    def obey(self, message: Ordered) -> bool:
        """Take note of an order. False: it is void, and workers must not hear of it either."""
        if self._was_overtaken(message):
            return False
        if isinstance(message, Commit):
            self._step = max(self._step, message.step + 1)
        elif isinstance(message, Freeze):
            self._opened(message)
        elif isinstance(message, Decision):
            self.decision, self._step = message, message.step  # all may have gone back
            self.pending = set(message.pending) & self.ranks
            if self.fresh and not message.resizes:
                self.keepers = self.ranks - self.pending
            self._node.decided(message)
            self.store = message.store or self.store
        elif isinstance(message, Resume):
            self.decision, self.pending, self._ran = None, set(), message.generation
            self._lost, self._left = set(), set()
            self._leavers, self._unfit = set(), {}
        elif isinstance(message, Reseated):
            after = (self.seat.seat + 1) % len(self.seat.bases)
            self.guardian = message.addresses.get(after, self.guardian)
        elif isinstance(message, Release):
            self.released = True
        elif isinstance(message, RunAgain):
            self.stopped = True
        return True

    def _was_overtaken(self, message: Ordered) -> bool:
        """On its way through the tree, by an order of the next generation or, if it repeats one, by Resume."""
        if isinstance(message, Freeze) and message.generation <= self._ran:
            return True
        of_recovery = (Hold, Freeze, Decision, Restore, Rebuild, Resume)
        return isinstance(message, (Commit, *of_recovery)) and message.generation < self.generation

    def _opened(self, freeze: Freeze) -> None:
        if freeze.generation > self.generation:
            self.decision = None
            self.generation = freeze.generation
            self._node.opened(freeze.generation, frozenset(freeze.lost))
        known = self._lost
        self._lost, self._left = set(freeze.lost), set(freeze.left)
        for rank in (self._lost - known) & self._wards():
            self._gone_wards[rank] = freeze.generation

    def again(self, order: RunAgain) -> Seated:
        """The seat in the next run of the script."""
        return msgspec.structs.replace(
            self.seat,
            store=order.store,
            guardian=self.guardian,
            generation=order.generation,
            restarts=order.restarts,
            taken=False,
            kept=order.kept,
        )

    def replaced(self, rank: int, store: str) -> None:
        """The next incarnation of a rank is being started, to meet the others in ``store``.

        A decision in force does not know of its loss.
        """
        self.store = store
        self.decision = None
        self.pending.add(rank)
        self._absent.discard(rank)
        self.gone.pop(rank, None)


def _gathered(tally: Tally | None) -> Gathered | None:
    return None if tally is None else Gathered(tally.stage, tally.generation, tally.step, tally.reports)
