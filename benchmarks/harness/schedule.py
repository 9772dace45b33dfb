"""Draws a schedule of faults from a seed: every kind, moment and choice of ranks in turn, in random order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from jobs.faults import CLOCK, KINDS, NODE_KINDS, READY, Fault

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
    kind_of, moment_of, target_of = (_turns(source, names) for names in (kinds, MOMENTS, targets))
    ends = 0 if clock_only else min(2, count)
    faults: list[Fault] = []
    step = 0 if not clock_only else 2
    while len(faults) < count - ends:
        moment = CLOCK if clock_only else next(moment_of)
        target = next(target_of)
        chosen = _spared(_ranks(source, target, ranks, faults), source, step, faults, holders)
        faults += _faults(source, len(faults), kind_of, moment, target, step, chosen)
        step += SPACING + source.choice((-1, 0, 0, 1))
    faults = faults[: count - ends]
    for moment, at in (("forward", steps - 1), ("after the loop", steps))[:ends]:
        kind = next(kind_of)
        chosen = _spared((source.randrange(ranks),), source, at, faults, holders)
        faults.append(Fault(len(faults), kind, moment, at, chosen))
    return faults


def with_nodes(workers: Sequence[Fault], count: int, seed: int, steps: int) -> list[Fault]:
    """The faults of workers and `count` of nodes, spread over the job, all ordered by step."""
    source = random.Random(f"nodes {seed}")
    kinds = _turns(source, NODE_KINDS)
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


def _faults(
    source: random.Random,
    number: int,
    kinds: Iterator[str],
    moment: str,
    target: str,
    step: int,
    chosen: tuple[int, ...],
) -> list[Fault]:
    """One fault, or two where the second strikes the replacement that the first one causes."""
    delay = source.uniform(0, 0.1) if moment == CLOCK else 0.003
    first = Fault(number, _kind(kinds, moment), moment, step, chosen, target, delay)
    if target != "replacement":
        return [first]
    where = source.choice(REPLACEMENT_MOMENTS)
    return [first, Fault(number + 1, next(kinds), where, 0, chosen, target, after=number)]


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


def _kind(kinds: Iterator[str], moment: str) -> str:
    """From outside there are only signals, and an exception cannot be raised while the gate is waited for."""
    kind = next(kinds)
    if moment == CLOCK:
        return "SIGSEGV" if kind == "SIGSEGV" else "SIGKILL"
    return "SIGKILL" if moment == READY and kind == "exception" else kind


def _turns(source: random.Random, names: Sequence[str]) -> Iterator[str]:
    """All names in random order, again and again."""
    while True:
        yield from source.sample(list(names), len(names))
