"""One schedule per seed: a job, its faults, and the run of both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from simulator.faults import Faults, plan
from simulator.oracle import Violation
from simulator.world import Job, Mutations, World

__all__ = ["Result", "Sizes", "play"]

LARGE = 64
"""From this many agents on a schedule has few steps and faults."""


@dataclass(frozen=True)
class Sizes:
    """Agents from and to; ``workers`` of each agent, 0: drawn; ``steps``: 0: drawn."""

    least: int
    most: int
    workers: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Result:
    """What came of one seed. ``violation``: a sentence, empty if all invariants held."""

    seed: int
    agents: int
    events: int
    faults: int
    restarts: int
    resizes: int
    drains: int
    seconds: float
    violation: str


def play(
    seed: int,
    sizes: Sizes,
    tell: Callable[[str], None] | None = None,
    mutations: Mutations | None = None,
    only: tuple[str, ...] = (),
    shrinks: bool | None = None,
) -> Result:
    """Run one schedule to its end, or to the first broken invariant.

    ``only``: kinds of faults; ``shrinks``: whether the job goes on with fewer nodes, None: as the seed says.
    """
    draw = random.Random(f"schedule {seed}")
    agents = draw.randint(sizes.least, sizes.most)
    large, gentle = agents >= LARGE, draw.random() < 0.3
    count = draw.randint(1, 3 if large else 6)
    job = Job(
        agents=agents,
        spares=1 if gentle else draw.randint(0, 2),
        size=sizes.workers or (1 if large else draw.choice([1, 1, 2])),
        steps=sizes.steps
        or ((8 * count if gentle else 6) if large else 60 if gentle else draw.randint(6, 30)),
        fan_out=32 if large else draw.choice([2, 2, 3, 32]),
        leave_early=0.0 if gentle else draw.choice([0.0, 0.0, 0.3]),
    )
    if shrinks is None:
        shrinks = not large and random.Random(f"shrinks {seed}").random() < 0.3
    if shrinks:
        job = replace(
            job, shrinks=True, spares=0 if gentle else job.spares, steps=300 if gentle else job.steps
        )
    world = World(job, seed, mutations or Mutations(), tell)
    Faults(world, plan(draw, count, gentle, agents, only), gentle, draw)
    violation = _run(world, gentle)
    return Result(
        seed,
        agents,
        world.clock.events,
        world.faults,
        len(world.restarts),
        len(world.resizes),
        world.drains,
        world.clock.now,
        violation,
    )


def _run(world: World, gentle: bool) -> str:
    try:
        world.run()
        if gentle and world.restarts:
            raise Violation(f"faults apart from each other led to a restart: {world.restarts}")
        if gentle and world.late:
            raise Violation(f"faults apart from each other led to a missed deadline: {world.late}")
    except (Violation, AssertionError, LookupError, ValueError, AttributeError, TypeError) as error:
        if not isinstance(error, Violation) and world.tell is not None:
            raise
        return f"{type(error).__name__}: {error}"
    return ""
