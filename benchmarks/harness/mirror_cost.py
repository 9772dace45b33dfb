"""What mirrors cost: one FSDP2 job on two nodes, run with and without them, the processor time of all its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from harness.cluster import Cluster
from harness.job import OURS, Plan, ignore_gone
from harness.steps import progress, read_log, step_seconds

WARM_UP, STEPS = 10, 60
LAYOUT = Path(__file__).parents[1] / "jobs" / "layout.py"


@dataclass(frozen=True)
class Usage:
    """Of one job, per step and for all ranks together.

    Attributes:
        workers_ms, agents_ms: processor time.
        step_ms: median time of a step.
    """

    workers_ms: float
    agents_ms: float
    step_ms: float


def measure(every: int, ranks: int, rounds: int, folder: Path) -> dict[str, object]:
    """Each round runs the job with mirrors of every ``every``-th step and without, in turns; medians are given."""
    plan = Plan(OURS, LAYOUT, folder, ranks, 10**6, environment={"BENCH_LAYOUT": "fsdp"}, nodes=2)
    found: dict[int, list[Usage]] = {every: [], 0: []}
    for number in range(rounds):
        for setting in found if number % 2 else reversed(found):
            variables = {**plan.environment, "CHECKPOINTLESS_MIRROR_EVERY": str(setting)}
            here = replace(plan, folder=folder / f"mirrors-{number}-{setting}", environment=variables)
            found[setting].append(_run(here))
            print(f"mirror_every={setting}, round {number + 1}: {found[setting][-1]}", flush=True)
    return {
        "mirror_every": every,
        "ranks": ranks,
        "nodes": 2,
        "with": _summary(found[every]),
        "without": _summary(found[0]),
    }


def _summary(usages: Sequence[Usage]) -> dict[str, float]:
    names = ("workers_ms", "agents_ms", "step_ms")
    return {name: median(getattr(usage, name) for usage in usages) for name in names}


def _run(plan: Plan) -> Usage:
    with Cluster(plan) as job:
        job.until(lambda: progress(plan.folder, plan.ranks) >= WARM_UP, timeout=180)
        first, before = progress(plan.folder, plan.ranks), _processor_time(job)
        job.until(lambda: progress(plan.folder, plan.ranks) >= first + STEPS, timeout=180)
        steps, after = progress(plan.folder, plan.ranks) - first, _processor_time(job)
    agents, workers = (1e3 * (late - early) / steps for early, late in zip(before, after, strict=True))
    commits = [commit for commit in read_log(plan.folder / "steps-0.log") if commit.step >= WARM_UP]
    return Usage(workers, agents, 1e3 * median(step_seconds(commits)))


def _processor_time(job: Cluster) -> tuple[float, float]:
    """Seconds so far: of the agents, and of all that they have started."""
    agents = {node.agent.pid for node in job.nodes}
    used = {True: 0.0, False: 0.0}
    for process in job.processes():
        with ignore_gone():
            times = process.cpu_times()
            used[process.pid in agents] += times.user + times.system
    return used[True], used[False]


def show(report: dict[str, object]) -> None:
    """For people."""
    for name in ("with", "without"):
        part = report[name]
        assert isinstance(part, dict)
        print(
            f"{name} mirrors: {part['workers_ms']:.1f} ms of processor time per step in workers, "
            f"{part['agents_ms']:.1f} ms in agents; a step takes {part['step_ms']:.1f} ms"
        )
