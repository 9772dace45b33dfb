"""Who keeps the job from going on: from what agents see of their workers, the ranks that all others wait for.

A step has a limit that a rank learns from its own steps, see `worker.pulse`. Agents say where their ranks are once one
of them is past its limit. A rank that waits at the gate or in a collective is past its limit too, but not to blame.

A worker that was ended may only have been slow. It is taken for that where the same happens again, see `Verdicts`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from checkpointless_elastic.protocol.messages import Message

__all__ = ["Activity", "Verdicts", "Where", "culprits", "parted"]

QUIET = 100
"""Steps after which an ended worker is forgotten."""
MAX_DOUBLINGS = 8


class Activity(enum.IntEnum):
    """What a rank's script is doing."""

    SETUP = 0  # no step is committed yet, or the script has ended: nothing is expected of it
    OUTSIDE = 1  # between replayable calls
    DATA = 2  # the loop waits for its next item
    CALL = 3
    GATE = 4  # ready: it waits for the others
    RECOVERY = 5  # as GATE


WORKING = (Activity.OUTSIDE, Activity.DATA, Activity.CALL)


class Where(Message, frozen=True):
    """Where one rank is.

    Attributes:
        activity: an `Activity`.
        late: it is past its limit.
        stretch: twice the number of committed calls, and one more inside of a call.
        issued: by group, a number that stands for it: collectives issued in this stretch.
        seconds: for which it has done what it does.
        stopped: its process was stopped by a signal.
        answers: its listener thread has answered.
        waits: its main thread waits for a collective; False if that cannot be seen.
        at: the innermost place of the main thread in the script, as far as is known.
        limit: seconds after which it is late.
        overlong: it has done so for longer than `hang_timeout`, whatever was learned, and in SETUP too.
    """

    activity: int
    late: bool
    stretch: int
    issued: dict[int, int]
    seconds: float
    stopped: bool = False
    answers: bool = True
    waits: bool = False
    at: str = ""
    limit: float = 0.0
    overlong: bool = False


class _Verdict(NamedTuple):
    step: int
    at: str


class Verdicts:
    """The workers of a node that were ended for being late.

    What is slow and not stuck is late again: in the replay of its step, and whenever the script comes to the same
    place. So each worker that was ended doubles what others are given at its step, and at its place for QUIET steps.
    Elsewhere nobody is given longer: hangs have no reason to come at one place.
    """

    def __init__(self) -> None:
        self._known: list[_Verdict] = []

    def ended(self, step: int, where: Where | None) -> None:
        """A worker was ended there. One that a signal had stopped was not slow. None: not known where it was."""
        if where is None or not where.stopped:
            self._known.append(_Verdict(step, where.at if where is not None else ""))

    def doublings(self, step: int, at: str | None = None) -> int:
        """How often the slack is doubled at this step and place; ``at``: as in Where, None while it is not known."""
        self._known = [verdict for verdict in self._known if 0 <= step - verdict.step <= QUIET]
        return min(MAX_DOUBLINGS, sum(step == known.step or at == known.at for known in self._known))


def culprits(ranks: Mapping[int, Where], running: bool) -> dict[int, str]:
    """The ranks that the job waits for, with a sentence that completes "rank 3 ..."; none if it may go on by itself.

    Never more than half of the ranks: what holds up most of them, such as a file system or a pause of all, is no rank's
    fault. But a signal that has stopped a process is evidence, not suspicion: then one must be left. ``running``: no
    recovery goes on. In one, nobody waits for replacements, but survivors may wait for each other, in groups that lost
    nobody.
    """
    stopped = [rank for rank, where in ranks.items() if where.late and where.stopped]
    if 0 < len(stopped) < len(ranks):
        return {rank: _sentence(ranks[rank], "its process is stopped by a signal") for rank in stopped}
    found, why = _suspects(ranks, running)
    return {rank: _sentence(ranks[rank], why) for rank in found} if 2 * len(found) <= len(ranks) else {}


def _suspects(ranks: Mapping[int, Where], running: bool) -> tuple[list[int], str]:
    working = {rank: where for rank, where in ranks.items() if where.late and where.activity in WORKING}
    if silent := [rank for rank, where in working.items() if not where.answers]:
        return silent, "none of its threads gets to run"
    peers = [where for where in ranks.values() if running or where.activity in WORKING]
    free = [rank for rank, where in working.items() if not any(_behind(other, where) for other in peers)]
    if not running:
        return free, "the others recover"
    if len(free) < len(ranks):
        return free, "the others wait for it"
    busy = [rank for rank in free if not ranks[rank].waits]
    if 0 < len(busy) < len(free):
        return busy, "the others wait for it"
    if any(ranks[rank].activity != Activity.CALL for rank in free):
        return [], ""  # all wait for data, or do the same between calls
    return [min(free)], "all ranks wait in the same collective, and no one is to blame"


def _behind(other: Where, where: Where) -> bool:
    """Does ``where`` wait for ``other``, as far as the collectives that they have issued say?"""
    if other.stretch != where.stretch:
        return other.stretch < where.stretch
    return any(other.issued.get(group, count) < count for group, count in where.issued.items())


def parted(ranks: Mapping[int, Where]) -> str:
    """Why ranks wait for each other for good, where the script has them do different things; else ''.

    One waits in a collective for another that issues none any more: it has ended its script, or is ready to commit.
    """
    if not all(where.late for where in ranks.values()):
        return ""
    idle = {rank: where for rank, where in sorted(ranks.items()) if where.activity == Activity.GATE}
    busy = {rank: where for rank, where in sorted(ranks.items()) if where.activity == Activity.CALL}
    for rank, where in busy.items():
        for other, there in idle.items():
            if any(where.issued.values()) and _behind(there, where):
                return _mismatch(rank, where, other, there.stretch % 2 == 1)
    return ""


def _mismatch(rank: int, where: Where, other: int, ready: bool) -> str:
    at = f" ({where.at})" if where.at else ""
    does = "is ready to commit without it" if ready else "has ended its script"
    cure = "issue the same collectives in a call" if ready else "make the same number of steps"
    return f"rank {rank} waits in a collective{at} for rank {other}, which {does}: let all ranks {cure}"


def _sentence(where: Where, why: str) -> str:
    doing = {Activity.DATA: "waiting for data", Activity.OUTSIDE: "between calls"}.get(
        Activity(where.activity), "in a call"
    )
    at = f", {where.at}" if where.at else ""
    return f"was stuck for {where.seconds:.1f} s (its limit is {where.limit:.1f} s) {doing}{at}: {why}"
