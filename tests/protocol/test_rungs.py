"""Which rung answers which fault: the table of cases of the one function that chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checkpointless_elastic.protocol.messages import Frozen, Phase
from checkpointless_elastic.protocol.rungs import Choice, Facts, Rung, choose

LIVE, MIRROR, RERUN, RESTART, STOP = Rung

LOSS = Facts("rank 1 was killed by SIGKILL", (1,), step=5, whole={0, 2}, faults=1, most=3)
"""A job of three ranks that all hold the same state and are protected has lost one."""


def answers(**places: tuple[int, Phase]) -> dict[int, Frozen]:
    return {int(name[1:]): Frozen(1, step, phase, True, True) for name, (step, phase) in places.items()}


VOID = answers(r0=(5, Phase.COMPUTING), r2=(5, Phase.READY))
LATE = answers(r0=(6, Phase.COMPUTING), r2=(5, Phase.READY))
SHARD = replace(LOSS, stranded=(1,))
MIRRORED = replace(SHARD, mirror_every=2)
STUCK = replace(LOSS, what="ranks [2] did not come out of state freezing in time", ranks=(2,), overdue=True)

CASES: dict[str, tuple[Facts, Rung, str]] = {
    "one of three": (LOSS, LIVE, "every piece of state has a replica in a survivor"),
    "one of three, all have answered": (replace(LOSS, answers=VOID), LIVE, "every piece of state"),
    "nobody": (Facts("a connection has ended", step=5, whole={0, 1}), LIVE, "every piece of state"),
    "before the first step": (
        replace(LOSS, step=0),
        RERUN,
        "rank 1 was killed by SIGKILL before the first step was committed",
    ),
    "a script without a Run": (
        replace(LOSS, unprotected={2, 0}),
        RERUN,
        "rank 1 was killed by SIGKILL, and the script of rank 0 has made no Run",
    ),
    "replicas that differ": (replace(LOSS, distrust="w differs"), RERUN, "by SIGKILL, and w differs"),
    "replicas that are found to differ while survivors answer": (
        replace(LOSS, distrust="w differs", answers=VOID),
        RERUN,
        "and w differs",
    ),
    "the only copy": (SHARD, RERUN, "no survivor holds the state of rank 1"),
    "a shard with a mirror": (MIRRORED, MIRROR, "no survivor holds the state of rank 1, which has a mirror"),
    "a shard with a mirror of this step": (
        replace(MIRRORED, answers=VOID, mirrored={1: 5}),
        MIRROR,
        "rank 1 goes on from its mirror of step 5",
    ),
    "a shard with an older mirror": (
        replace(MIRRORED, answers=VOID, mirrored={1: 4}),
        MIRROR,
        "no survivor holds the state of rank 1, so every rank goes on from its mirror of step 4",
    ),
    "a shard before the first mirror": (
        replace(MIRRORED, mirror_every=8, answers=VOID, mirrored={1: -1}),
        RERUN,
        "no survivor holds the state of rank 1, and the first mirror is not yet due at step 5",
    ),
    "a shard with a replica, with mirrors": (replace(LOSS, mirror_every=2, answers=VOID), LIVE, "replica"),
    "a step that one survivor has not heard of": (replace(LOSS, answers=LATE), LIVE, "every piece"),
    "a survivor that was not ready for a committed step": (
        replace(LOSS, answers=answers(r0=(6, Phase.COMPUTING), r2=(5, Phase.COMPUTING))),
        RERUN,
        "rank 2 is at step 5, not ready, while step 5 was committed",
    ),
    "the same error twice": (
        replace(LOSS, error="ValueError: bad"),
        STOP,
        "rank 1 failed twice at step 5 with the same error: ValueError: bad",
    ),
    "the same error twice in shadow": (
        replace(LOSS, error="ValueError: bad", joining=True),
        RERUN,
        "rank 1 failed twice at step 5 with the same error: ValueError: bad",
    ),
    "as many faults as are allowed": (replace(LOSS, faults=3), LIVE, "every piece of state"),
    "too many faults": (
        replace(LOSS, faults=4),
        RERUN,
        "4 faults at step 5 without a committed step between them, the last one: rank 1 was killed by SIGKILL",
    ),
    "a fault before the first step, after rung 3": (
        replace(LOSS, step=0, began=3),
        RESTART,
        "was committed, and no step was committed since the script was run again by rung 3",
    ),
    "a fault before the first step, after rung 4": (replace(LOSS, step=0, began=4), RESTART, "by rung 4"),
    "a script without a Run, after rung 3": (
        replace(LOSS, step=0, unprotected={0}, began=3),
        RESTART,
        "has made no Run, and no step was committed since the script was run again by rung 3",
    ),
    "the only copy, steps after rung 3": (replace(SHARD, began=3), RERUN, "no survivor holds the state"),
    "the same error twice, after rung 3": (
        replace(LOSS, error="ValueError: bad", began=3, step=0),
        STOP,
        "rank 1 failed twice at step 0",
    ),
    "a deadline": (STUCK, LIVE, "they are ended and replaced, since they may be stuck alone"),
    "a second deadline": (
        replace(STUCK, endings=1),
        RESTART,
        "ranks [2] did not come out of state freezing in time, after ranks were ended in the same recovery",
    ),
    "a deadline that all have missed": (
        replace(STUCK, ranks=(0, 2)),
        RESTART,
        "ranks [2] did not come out of state freezing in time, and no other rank is left",
    ),
    "a deadline missed by the only copy": (
        replace(STUCK, stranded=(2,)),
        RESTART,
        "in time, and no other holds the state of rank 2",
    ),
    "a deadline missed by the only copy, with mirrors": (
        replace(STUCK, stranded=(2,), mirror_every=2),
        LIVE,
        "they are ended and replaced",
    ),
    "a deadline where replicas differ": (replace(STUCK, distrust="w differs"), RESTART, "and w differs"),
    "a replacement that is unfit": (
        replace(MIRRORED, what="rank 1 cannot recover live: it is torn", unfit=True, leaving=True),
        RERUN,
        "rank 1 cannot recover live: it is torn",
    ),
    "a survivor that is unfit": (
        replace(LOSS, what="rank 2 cannot recover live: it is torn", ranks=(2,), unfit=True, leaving=True),
        RERUN,
        "rank 2 cannot recover live: it is torn",
    ),
    "a survivor that is unfit, with mirrors": (
        replace(MIRRORED, what="rank 2 is torn", ranks=(2,), unfit=True, leaving=True),
        MIRROR,
        "rank 2 is torn, so every rank goes on from its mirror of step 4",
    ),
    "a survivor that is unfit when others restore, with mirrors": (
        replace(MIRRORED, what="rank 2 is torn", ranks=(2,), unfit=True),
        RERUN,
        "rank 2 is torn",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answer_to(case: str) -> None:
    facts, rung, reason = CASES[case]
    choice = choose(facts)
    assert (choice.rung, choice.goes_on) == (rung, rung <= MIRROR)
    assert reason in choice.reason
    assert not choice.reason.endswith(".")


def test_all_go_on_at_the_step_that_one_has_committed() -> None:
    assert choose(replace(LOSS, answers=VOID)).step == 5
    assert choose(replace(LOSS, answers=LATE)).step == 6


def test_all_go_back_to_one_mirror() -> None:
    choice = choose(replace(MIRRORED, answers=VOID, mirrored={1: 4}))
    assert (choice.step, choice.ends, choice.back) == (4, {0, 2}, True)
    assert not choose(replace(MIRRORED, answers=VOID, mirrored={1: 5})).back


def test_those_that_miss_a_deadline_are_ended_and_nobody_else() -> None:
    choice = choose(STUCK)
    assert (choice.ends, choice.back) == ({2}, False)


def test_who_fails_again_is_to_blame() -> None:
    assert choose(replace(LOSS, error="ValueError: bad")) == Choice(
        STOP, "rank 1 failed twice at step 5 with the same error: ValueError: bad", (1,)
    )
