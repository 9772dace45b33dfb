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
        STOP,
        "4 faults at step 5 without a committed step between them",
    ),
    "a deadline": (
        replace(LOSS, what="ranks [2] did not come out of state freezing in time", overdue=True),
        RESTART,
        "ranks [2] did not come out of state freezing in time",
    ),
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
    assert (choice.step, choice.back) == (4, True)
    assert not choose(replace(MIRRORED, answers=VOID, mirrored={1: 5})).back


def test_who_fails_again_is_to_blame() -> None:
    assert choose(replace(LOSS, error="ValueError: bad")) == Choice(
        STOP, "rank 1 failed twice at step 5 with the same error: ValueError: bad", (1,)
    )
