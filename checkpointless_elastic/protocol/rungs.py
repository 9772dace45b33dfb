"""Which rung answers a fault (design, section 2): one pure function, `choose`.

Each rule below looks at the facts and has an answer, or None; the first answer counts. The last rule always has one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace

from checkpointless_elastic.protocol.messages import Frozen, Phase
from checkpointless_elastic.protocol.mirrors import last_due

__all__ = ["Choice", "Facts", "Rung", "choose"]


class Rung(enum.IntEnum):
    """The answers to a fault, each with a greater loss than the one before."""

    LIVE = 1  # lost ranks are replaced, their state comes from survivors
    MIRROR = 2  # ... or from their mirrors, to whose step all go back
    RERUN = 3  # the script is run again from its top
    RESTART = 4  # ... by workers that are forked anew
    STOP = 5  # the job has failed


@dataclass(frozen=True)
class Facts:
    """What is known of a fault.

    Attributes:
        what: has happened; a sentence without its full stop.
        ranks: that it has struck.
        step: that is committed next; ``first``: the one at which this run of the script began.
        whole: survivors, which hold the state of their step.
        stranded: lost ranks of which no survivor holds the state.
        unprotected: ranks whose script has made no Run, as far as is known.
        distrust: why replicas cannot be used; empty: they can.
        error: the exception that this rank had before at this step, and has again; empty: none.
        joining: the rank is a replacement that has not joined.
        faults, most: without a committed step between them, this one counted; and how many are allowed.
        began: the rung by which this run of the script began; 0: it is the first, or that is not known.
        overdue: a deadline has passed, and these ranks were missing.
        endings: how often survivors were ended since the last committed step, to come back as replacements.
        unfit: the rank has said that it cannot recover live; ``leaving``: nobody has gone on from the void step yet.
        answers: what all survivors have said to Freeze; None: not all have.
        mirror_every: see Rules; ``mirrored``: of lost ranks, the step of their newest mirror.
    """

    what: str
    ranks: tuple[int, ...] = ()
    step: int = 0
    first: int = 0
    whole: Set[int] = frozenset()
    stranded: tuple[int, ...] = ()
    unprotected: Set[int] = frozenset()
    distrust: str = ""
    error: str = ""
    joining: bool = False
    faults: int = 0
    most: int = 0
    began: int = 0
    overdue: bool = False
    endings: int = 0
    unfit: bool = False
    leaving: bool = False
    answers: Mapping[int, Frozen] | None = None
    mirror_every: int = 0
    mirrored: Mapping[int, int] | None = None

    @property
    def target(self) -> int:
        """The step at which survivors can go on: if one of them has committed a step, all were ready for it."""
        return max([self.step, *(answer.step for answer in (self.answers or {}).values())])


@dataclass(frozen=True)
class Choice:
    """The answer.

    Attributes:
        reason: one sentence, without its full stop.
        ranks: with STOP, those to blame.
        step: at which all go on, once all survivors have said where they stand.
        ends: survivors that are ended, and come back as replacements.
        back: these are all, which go back to the mirrors of that step.
    """

    rung: Rung
    reason: str
    ranks: tuple[int, ...] = ()
    step: int = -1
    ends: frozenset[int] = frozenset()
    back: bool = False

    @property
    def goes_on(self) -> bool:
        """Does the run of the script go on?"""
        return self.rung <= Rung.MIRROR


def choose(facts: Facts) -> Choice:
    """The lowest rung that can answer the fault, and has not just failed to."""
    choice = next(filter(None, (rule(facts) for rule in _RULES)))
    if choice.rung is Rung.RERUN and facts.began >= Rung.RERUN and facts.step == facts.first:
        reason = (
            f"{choice.reason}, and no step was committed since the script was run again by rung {facts.began}"
        )
        return replace(choice, rung=Rung.RESTART, reason=reason)
    return choice


def _same_error(facts: Facts) -> Choice | None:
    """The same exception twice at one step is a bug of the job. But a script may fail in shadow only."""
    if not facts.error:
        return None
    (rank,) = facts.ranks
    reason = f"rank {rank} failed twice at step {facts.step} with the same error: {facts.error}"
    return Choice(Rung.RERUN, reason) if facts.joining else Choice(Rung.STOP, reason, facts.ranks)


def _too_many(facts: Facts) -> Choice | None:
    if facts.faults <= facts.most:
        return None
    faults = f"{facts.faults} faults at step {facts.step} without a committed step between them"
    return Choice(Rung.RERUN, f"{faults}, the last one: {facts.what}")


def _overdue(facts: Facts) -> Choice | None:
    """Those that are missing may be stuck alone: others need not pay for it the first time."""
    if not facts.overdue:
        return None
    missing = frozenset(facts.ranks)
    if facts.endings:
        return Choice(Rung.RESTART, f"{facts.what}, after ranks were ended in the same recovery")
    if not facts.whole - missing:
        return Choice(Rung.RESTART, f"{facts.what}, and no other rank is left")
    if facts.distrust:
        return Choice(Rung.RESTART, f"{facts.what}, and {facts.distrust}")
    if facts.stranded and not facts.mirror_every:
        return Choice(Rung.RESTART, f"{facts.what}, and no other holds the state of rank {facts.stranded[0]}")
    return Choice(Rung.LIVE, "they are ended and replaced, since they may be stuck alone", ends=missing)


def _unfit(facts: Facts) -> Choice | None:
    """With mirrors a survivor that is unfit can go back with all; a replacement cannot do better."""
    if not facts.unfit:
        return None
    if facts.mirror_every and facts.leaving and facts.whole >= set(facts.ranks):
        return _back(facts, facts.what)
    return Choice(Rung.RERUN, facts.what)


def _unprotected(facts: Facts) -> Choice | None:
    if facts.distrust:
        return Choice(Rung.RERUN, f"{facts.what}, and {facts.distrust}")
    if facts.unprotected:
        rank = min(facts.unprotected)
        return Choice(Rung.RERUN, f"{facts.what}, and the script of rank {rank} has made no Run")
    if facts.step == facts.first:
        return Choice(Rung.RERUN, f"{facts.what} before the first step was committed")
    return None


def _behind(facts: Facts) -> Choice | None:
    """All ranks must come to one step, and only a rank that was ready for a committed step can apply it late."""
    target = facts.target
    for rank, answer in sorted((facts.answers or {}).items()):
        if answer.step != target and (answer.step, answer.phase) != (target - 1, Phase.READY):
            where = f"rank {rank} is at step {answer.step}, not ready"
            return Choice(Rung.RERUN, f"{where}, while step {target - 1} was committed")
    return None


def _stranded(facts: Facts) -> Choice | None:
    if not facts.stranded:
        return None
    rank, target = facts.stranded[0], facts.target
    reason = f"no survivor holds the state of rank {rank}"
    if not facts.mirror_every:
        return Choice(Rung.RERUN, reason)
    if facts.answers is None:
        return Choice(Rung.MIRROR, f"{reason}, which has a mirror")
    if any((facts.mirrored or {}).get(rank) != target for rank in facts.stranded):
        return _back(facts, reason)
    return Choice(Rung.MIRROR, f"rank {rank} goes on from its mirror of step {target}", step=target)


def _back(facts: Facts, reason: str) -> Choice:
    """To the last mirror due at a committed step: a step is committed when all have it, and each keeps two."""
    back = last_due(facts.target - 1, facts.mirror_every)
    if back is None:
        return Choice(Rung.RERUN, f"{reason}, and the first mirror is not yet due at step {facts.target}")
    return Choice(
        Rung.MIRROR,
        f"{reason}, so every rank goes on from its mirror of step {back}",
        step=back,
        ends=frozenset(facts.whole),
        back=True,
    )


def _live(facts: Facts) -> Choice:
    return Choice(Rung.LIVE, "every piece of state has a replica in a survivor", step=facts.target)


_RULES: tuple[Callable[[Facts], Choice | None], ...] = (
    _same_error,
    _too_many,
    _overdue,
    _unfit,
    _unprotected,
    _behind,
    _stranded,
    _live,
)
