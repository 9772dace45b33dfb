"""What does protection cost while nothing goes wrong?

The same job runs twice on this machine, under our launcher and under plain torchrun. Only one of them runs at
a time: the processes of the other are stopped (SIGSTOP). They take short turns (--turn), in the order
ABBA, for --seconds; a step that a turn cut in two is left out. Each pair of neighbouring turns gives one
ratio of median step times, and the overhead is the median of these ratios, with a 95 % interval by bootstrap.
Both jobs are started anew --instances times, since two equal jobs can differ by where their memory lies. A
busy or drifting machine hits both halves of a pair alike.

Two small figures are measured inside one job of ours, where protected and native calls take turns: gate_us, a
replayable function that only calls optimizer.step() on one small parameter, less the same call unprotected
(optimizer_step_us says how much of it lies inside optimizer.step(), where the ranks wait for each other); and
collective_us, an all_reduce of one number on a native group and on an elastic one.

A script given by --script is judged by the files that it writes, and should do at least BENCH_STEPS steps:
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness
from harness.job import OURS, TORCHRUN, Job, JobFailedError, Plan, ignore_gone
from harness.machine import provenance
from harness.report import Bar, print_bars, write_json
from harness.steps import progress, read_log, step_seconds

JOBS = Path(__file__).parent / "jobs"
WARM_UP = 10


@dataclass(frozen=True)
class Turn:
    """The time in which one job ran and the other was stopped, in nanoseconds of time.time_ns()."""

    backend: str
    start_ns: int
    end_ns: int


def send(job: Job, number: signal.Signals) -> None:
    """Stops or continues all processes of a job; workers stop before torchrun and continue after it."""
    processes = job.processes()
    for process in reversed(processes) if number == signal.SIGSTOP else processes:
        with ignore_gone():
            process.send_signal(number)


def take_turns(jobs: dict[str, Job], seconds: float, turn_seconds: float) -> list[Turn]:
    """Lets the stopped jobs run in turns until the time is over or one of them has ended."""
    turns: list[Turn] = []
    end = time.monotonic() + seconds
    order = [OURS, TORCHRUN, TORCHRUN, OURS]
    while time.monotonic() < end and all(job.running() for job in jobs.values()):
        backend = order[len(turns) % 4]
        send(jobs[backend], signal.SIGCONT)
        start = time.time_ns()
        time.sleep(turn_seconds)
        turns.append(Turn(backend, start, time.time_ns()))
        send(jobs[backend], signal.SIGSTOP)
    return turns


def turn_median(folder: Path, turn: Turn) -> float | None:
    """Median step of one turn, seen by rank 0; None when fewer than two whole steps fit into it."""
    commits = [c for c in read_log(folder / "steps-0.log") if turn.start_ns < c.time_ns < turn.end_ns]
    steps = step_seconds(commits)
    return median(steps) if len(steps) >= 2 else None


def pair_ratios(folders: dict[str, Path], turns: Sequence[Turn]) -> tuple[list[float], dict[str, float]]:
    """One ratio (ours to plain) per pair of neighbouring turns, and the median step of each launcher."""
    ratios: list[float] = []
    steps: dict[str, list[float]] = {OURS: [], TORCHRUN: []}
    for first, second in zip(turns[::2], turns[1::2], strict=False):
        medians = {turn.backend: turn_median(folders[turn.backend], turn) for turn in (first, second)}
        ours, plain = medians[OURS], medians[TORCHRUN]
        if ours is not None and plain is not None:
            ratios.append(ours / plain)
            steps[OURS].append(ours)
            steps[TORCHRUN].append(plain)
    if not ratios:
        raise JobFailedError("No pair of turns held two whole steps of each job; use a longer --turn.")
    return ratios, {backend: median(values) for backend, values in steps.items()}


def interval(ratios: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the median ratio by bootstrap, with a fixed seed."""
    source = random.Random(0)
    medians = sorted(median(source.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return medians[round(0.025 * rounds)], medians[round(0.975 * rounds)]


def compare_jobs(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs pairs of jobs in turns and returns the part of the report on whole steps."""
    ratios: list[float] = []
    steps: dict[str, list[float]] = {OURS: [], TORCHRUN: []}
    for number in range(options.instances):
        plans = {backend: step_plan(options, backend, folder / f"{backend}-{number}") for backend in steps}
        turns = run_in_turns(plans, options)
        more, medians = pair_ratios({backend: plan.folder for backend, plan in plans.items()}, turns)
        ratios += more
        for backend, seconds in medians.items():
            steps[backend].append(seconds)
        print(
            f"pair of jobs {number + 1}: {(median(more) - 1) * 100:+.2f} % in {len(more)} pairs of turns",
            flush=True,
        )
    low, high = interval(ratios)
    return {
        "overhead_percent": (median(ratios) - 1) * 100,
        "overhead_interval_percent": [(low - 1) * 100, (high - 1) * 100],
        "pairs": len(ratios),
        "step_ms": {"protected": median(steps[OURS]) * 1e3, "plain": median(steps[TORCHRUN]) * 1e3},
    }


def step_plan(options: argparse.Namespace, backend: str, folder: Path) -> Plan:
    variables = {"BENCH_BATCH": str(options.batch)}
    return Plan(backend, options.script, folder, options.ranks, steps=10**6, environment=variables)


def run_in_turns(plans: dict[str, Plan], options: argparse.Namespace) -> list[Turn]:
    """Starts both jobs, one after the other, and lets them take turns for their share of the time."""
    with Job(plans[OURS]) as ours:
        warm_up(ours)
        send(ours, signal.SIGSTOP)
        with Job(plans[TORCHRUN]) as plain:
            warm_up(plain)
            send(plain, signal.SIGSTOP)
            jobs = {OURS: ours, TORCHRUN: plain}
            return take_turns(jobs, options.seconds / options.instances, options.turn)


def warm_up(job: Job) -> None:
    folder, ranks = job.plan.folder, job.plan.ranks
    job.until(lambda: progress(folder, ranks) >= WARM_UP, timeout=120)


def small_calls(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs the job that measures the gate and one collective; the slowest rank's figures count."""
    plan = Plan(backend=OURS, script=JOBS / "micro.py", folder=folder / "micro", ranks=options.ranks)
    with Job(plan) as job:
        job.finish(timeout=120)
    found = [json.loads((plan.folder / f"micro-{rank}.json").read_text()) for rank in range(options.ranks)]
    return {
        "gate_us": max(rank["gate_us"] for rank in found),
        "collective_us": {
            "native": max(rank["native_us"] for rank in found),
            "elastic": max(rank["native_us"] for rank in found) + max(rank["added_us"] for rank in found),
        },
        "optimizer_step_us": {
            "plain": max(rank["plain_step_us"] for rank in found),
            "protected": max(rank["protected_step_us"] for rank in found),
        },
    }


def show(report: dict[str, object], options: argparse.Namespace) -> None:
    steps, collective, bounds = (
        report["step_ms"],
        report["collective_us"],
        report["overhead_interval_percent"],
    )
    assert isinstance(steps, dict)
    assert isinstance(collective, dict)
    assert isinstance(bounds, list)
    print(
        f"steps: {steps['plain']:.1f} ms plain, {steps['protected']:.1f} ms protected, {report['pairs']} pairs"
    )
    print(f"overhead: {report['overhead_percent']:.2f} % (95 %: {bounds[0]:.2f} to {bounds[1]:.2f})")
    print_bars(
        [
            Bar("overhead", float(str(report["overhead_percent"])), 1.0, " %"),
            Bar(f"gate of {options.ranks} ranks", float(str(report["gate_us"])), 250, " us"),
            Bar("elastic over native collective", collective["elastic"] - collective["native"], 20, " us"),
        ]
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    contract = (harness.__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{contract}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="workers of each job (default 4)")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--script", type=Path, default=JOBS / "ddp.py", help="another training script")
    parser.add_argument("--seconds", type=float, default=140, help="time for the turns (default 140)")
    parser.add_argument("--instances", type=int, default=4, help="pairs of jobs to start (default 4)")
    parser.add_argument("--turn", type=float, default=0.6, help="seconds of one turn (default 0.6)")
    parser.add_argument("--batch", type=int, default=48, help="BENCH_BATCH, sizes the step (default 48)")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="steady-state-") as folder:
        report = {**small_calls(options, Path(folder)), **compare_jobs(options, Path(folder)), **provenance()}
    show(report, options)
    write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
