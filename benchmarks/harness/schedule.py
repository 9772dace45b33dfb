"""Draws a schedule of faults from a seed: every kind, moment and choice of ranks in turn, in random order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jobs.faults import CLOCK, FLIP, KINDS, NODE_KINDS, OUTSIDE_KINDS, READY, Fault

from checkpointless_elastic.chaos.plan import turns
from harness.layouts import Holders, survivable

MOMENTS = (
    CLOCK,
    "data",
    "forward",
    "backward",
    READY,
    "update",
    "after gate",
    "evaluation",
    "saving",
)
TARGETS = ("one rank", "one rank", "rank 0", "several", "all but one", "same again", "replacement")
SPACING = 3  # steps between two faults
TAIL = 20  # steps at the end without new faults but for those of the end itself
REPLACEMENT_MOMENTS = ("start", "built")
EVERY = {"evaluation": 4, "saving": 7}  # steps between two of these moments in jobs/chaos_job.py
CLOCK_REACH = 4  # steps that a job may do until the clock strikes
LASTS = (0.3, 2.0)  # seconds until a fault passes that kills nobody
SLOW_STEPS = 10  # steps that a job may do in a second while a rank is slow


def steps_needed(faults: int, per_epoch: int = 10) -> int:
    """Steps of a job that has room for so many faults: whole epochs."""
    return -(-(faults * SPACING + TAIL) // per_epoch) * per_epoch


def schedule(
    count: int,
    seed: int,
    ranks: int,
    steps: int,
    kinds: Sequence[str] = KINDS,
    clock_only: bool = False,
    holders: Holders | None = None,
) -> list[Fault]:
    """The faults of one job, ordered by step. The last two strike in the last step and after the loop.

    `holders`: which ranks hold the same. Each of these sets then keeps a living rank, whatever strikes at once; "all
    but one" is then as many ranks as that allows. None: all hold the same, and faults that meet may take all of them.
    """
    source = random.Random(seed)
    targets = TARGETS[:-1] if clock_only else TARGETS
    kind_of, moment_of, target_of = (turns(source, names) for names in (kinds, MOMENTS, targets))
    deadly = [kind for kind in kinds if kind not in OUTSIDE_KINDS]
    ends = min(2, count) if deadly and not clock_only else 0
    faults: list[Fault] = []
    step = 0 if not clock_only else 2
    while len(faults) < count - ends:
        kind, moment, target = next(kind_of), CLOCK if clock_only else next(moment_of), next(target_of)
        if kind in OUTSIDE_KINDS:
            moment, target = CLOCK, "agent" if kind == "stopped-agent" else "one rank"
        chosen = _spared(_ranks(source, target, ranks, faults), source, step, faults, holders)
        first = _first(source, len(faults), kind, moment, target, step, chosen)
        faults += [first, *(_second(source, first, deadly) if target == "replacement" else ())]
        step += SPACING + source.choice((-1, 0, 0, 1))
    faults = faults[: count - ends]
    for moment, at in (("forward", steps - 1), ("after the loop", steps))[:ends]:
        kind = source.choice(deadly)
        chosen = _spared((source.randrange(ranks),), source, at, faults, holders)
        faults.append(Fault(len(faults), kind, moment, at, chosen))
    return faults


def with_nodes(
    workers: Sequence[Fault], count: int, seed: int, steps: int, names: Sequence[str] = NODE_KINDS
) -> list[Fault]:
    """The faults of workers and `count` of nodes, of these kinds, spread over the job, all ordered by step."""
    source = random.Random(f"nodes {seed}")
    kinds = turns(source, names)
    part = (steps - TAIL) / max(count, 1)
    nodes = [
        Fault(
            len(workers) + index,
            next(kinds),
            CLOCK,
            int(part * (index + source.uniform(0.1, 0.9))),
            (),
            "node",
            source.uniform(0, 0.1),
        )
        for index in range(count)
    ]
    return sorted([*workers, *nodes], key=lambda fault: fault.step)


def with_flips(others: Sequence[Fault], count: int, seed: int, ranks: int, steps: int) -> list[Fault]:
    """These faults and `count` flipped bits, all ordered by step; fewer where the job has no room for so many.

    Each flip has a step in which no other fault can strike: a rank whose memory is bad is a source for others until its
    step is compared."""
    source = random.Random(f"flips {seed}")
    free = set(range(2, steps - 1)) - {step for fault in others for step in _taken(fault)}
    flips = [
        Fault(len(others) + index, FLIP, "data", step, (source.randrange(ranks),))
        for index, step in enumerate(sorted(source.sample(sorted(free), min(count, len(free)))))
    ]
    return sorted([*others, *flips], key=lambda fault: fault.step)


def _taken(fault: Fault) -> range:
    """The steps in which a fault may take a rank, or still be answered."""
    slow = round(SLOW_STEPS * fault.lasts) if fault.kind == "slow" else 0
    return range(fault.step, last_step(fault) + slow + 2)


def last_step(fault: Fault) -> int:
    """The last step at which a fault may strike."""
    every = EVERY.get(fault.moment, 1)
    return -(-fault.step // every) * every + (CLOCK_REACH if fault.moment == CLOCK else 0)


def meeting(step: int, before: Sequence[Fault]) -> set[int]:
    """Ranks that earlier faults may have taken while one of this step strikes: a recovery ends with a step."""
    return {rank for fault in before if last_step(fault) + 1 >= step for rank in fault.ranks}


def _spared(
    chosen: tuple[int, ...],
    source: random.Random,
    step: int,
    before: Sequence[Fault],
    holders: Holders | None,
) -> tuple[int, ...]:
    """As many of the chosen ranks as can be lost beside those that may be lost just then; at least one."""
    if holders is None:
        return chosen
    lost = meeting(step, before)
    kept: list[int] = []
    for rank in source.sample(chosen, len(chosen)):
        if survivable(lost | {*kept, rank}, holders):
            kept.append(rank)
    return tuple(sorted(kept)) or (source.choice(sorted(lost)),)


def _first(
    source: random.Random,
    number: int,
    kind: str,
    moment: str,
    target: str,
    step: int,
    chosen: tuple[int, ...],
) -> Fault:
    delay = source.uniform(0, 0.1) if moment == CLOCK else 0.003
    lasts = source.uniform(*LASTS) if kind in OUTSIDE_KINDS else 0.0
    return Fault(number, _possible(kind, moment), moment, step, chosen, target, delay, lasts=lasts)


def _second(source: random.Random, first: Fault, deadly: Sequence[str]) -> list[Fault]:
    """A fault that strikes the replacement which the first one causes."""
    where = source.choice(REPLACEMENT_MOMENTS)
    kind = source.choice(deadly)
    return [Fault(first.number + 1, kind, where, 0, first.ranks, first.target, after=first.number)]


def _ranks(source: random.Random, target: str, ranks: int, before: Sequence[Fault]) -> tuple[int, ...]:
    if target == "rank 0":
        return (0,)
    if target == "several":
        return tuple(sorted(source.sample(range(ranks), source.randint(min(2, ranks - 1), ranks - 1))))
    if target == "all but one":
        return tuple(sorted(source.sample(range(ranks), ranks - 1)))
    if target == "same again" and before:
        return before[-1].ranks
    return (source.randrange(ranks),)


def _possible(kind: str, moment: str) -> str:
    """Who dies from outside dies of a signal, and an exception cannot be raised while the gate is waited for."""
    if moment == CLOCK and kind not in OUTSIDE_KINDS:
        return "SIGSEGV" if kind == "SIGSEGV" else "SIGKILL"
    return "SIGKILL" if moment == READY and kind == "exception" else kind
