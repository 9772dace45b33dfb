"""What does protection cost while nothing goes wrong?

The same job runs twice on this machine, under our launcher and under plain torchrun. Only one of them runs at
a time: the processes of the other are stopped (SIGSTOP). They take short turns (--turn), in the order
ABBA, for --seconds; a step that a turn cut in two is left out. Each pair of neighbouring turns gives one
ratio of median step times, and the overhead is the median of these ratios, with a 95 % interval by bootstrap.
Jobs are started anew several times, since two equal jobs can differ by where their memory lies, and each of the two
is the first to be started as often as the other: of two equal jobs the first was seen to be slower. A busy or drifting
machine hits both halves of a pair alike.

Two jobs are measured so. In the first, which gives overhead_percent, DDP trains 0.5 million parameters and
most of a step of 100 ms is a wait, as for an accelerator: workers outnumber the cores of a small machine, and
a step that they spend computing varies by 15 % and more, which hides an overhead of 1 %. The second,
compute_bound in the report, trains 5 million parameters and keeps all cores busy; mind its interval.

Small figures are measured inside one job of ours, where protected and native calls take turns:

    gate_us        median time from the moment when the last rank comes to a gate until the first rank leaves it,
                   by the clock that the processes share: the vote, the decision and its way back
    gate_last_us   the same until the last rank has left it; with fewer cores than ranks this one waits for a
                   core that the first ranks use for their update
    call_us        what a replayable function that only calls optimizer.step() on one small parameter takes more
                   than that call alone, with all ranks at it at once
    collective_us  an all_reduce of one number on a native group and on an elastic one
    issued_us      only on an accelerator (see gpu_check.py): the part of it in which the caller waits

With --mirror-every K nothing of this is measured but the cost of mirrors: an FSDP2 job of 5 million parameters on two
nodes (network namespaces) runs with and without them, and the processor time per step of its workers and agents is
compared. Each byte of a mirror is copied once by its worker, and sent and received once by the agents.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import mirror_cost
from harness.job import OURS, TORCHRUN, Job, JobFailedError, Plan, ignore_gone
from harness.report import Bar, print_bars, write_json
from harness.steps import progress, read_log, step_seconds

from checkpointless_elastic.observe.machine import provenance

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


@dataclass(frozen=True)
class Workload:
    """One job to compare, how often to start it (an even number), and for how many seconds in all."""

    name: str
    instances: int
    seconds: float
    variables: Mapping[str, str]


def workloads(options: argparse.Namespace) -> list[Workload]:
    """What is compared: our two jobs, or the given script for all of the time."""
    if options.script != JOBS / "ddp.py":
        return [Workload("given", 4, options.seconds, {})]
    waiting = {"BENCH_WIDTH": "400", "BENCH_BATCH": "8", "BENCH_DEVICE_MS": "85"}
    return [
        Workload("waiting", 6, 0.7 * options.seconds, waiting),
        Workload("compute_bound", 2, 0.3 * options.seconds, {"BENCH_BATCH": "32"}),
    ]


def compare_jobs(work: Workload, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs pairs of jobs in turns and returns what the report says of them."""
    ratios: list[float] = []
    steps: dict[str, list[float]] = {OURS: [], TORCHRUN: []}
    for number in range(work.instances):
        plans = {
            backend: Plan(
                backend,
                options.script,
                folder / work.name / f"{backend}-{number}",
                options.ranks,
                steps=10**6,
                environment=work.variables,
            )
            for backend in steps
        }
        first, second = [OURS, TORCHRUN] if number % 2 == 0 else [TORCHRUN, OURS]
        turns = run_in_turns(plans[first], plans[second], work.seconds / work.instances, options.turn)
        more, medians = pair_ratios({backend: plan.folder for backend, plan in plans.items()}, turns)
        ratios += more
        for backend, seconds in medians.items():
            steps[backend].append(seconds)
        print(
            f"{work.name} job {number + 1}: {(median(more) - 1) * 100:+.2f} % in {len(more)} pairs",
            flush=True,
        )
    low, high = interval(ratios)
    return {
        "overhead_percent": (median(ratios) - 1) * 100,
        "overhead_interval_percent": [(low - 1) * 100, (high - 1) * 100],
        "pairs": len(ratios),
        "step_ms": {"protected": median(steps[OURS]) * 1e3, "plain": median(steps[TORCHRUN]) * 1e3},
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    first, *others = workloads(options)
    return {
        **small_calls(options, folder),
        **compare_jobs(first, options, folder),
        **{work.name: compare_jobs(work, options, folder) for work in others},
        "ranks": options.ranks,
        **provenance(),
    }


def run_in_turns(first: Plan, second: Plan, seconds: float, turn: float) -> list[Turn]:
    """Starts both jobs, one after the other, and lets them take turns."""
    with Job(first) as one:
        warm_up(one)
        send(one, signal.SIGSTOP)
        with Job(second) as other:
            warm_up(other)
            send(other, signal.SIGSTOP)
            return take_turns({first.backend: one, second.backend: other}, seconds, turn)


def warm_up(job: Job) -> None:
    folder, ranks = job.plan.folder, job.plan.ranks
    job.until(lambda: progress(folder, ranks) >= WARM_UP, timeout=120)


def small_calls(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs the job that measures the gate and one collective; the slowest rank's figures count."""
    plan = Plan(backend=OURS, script=JOBS / "micro.py", folder=folder / "micro", ranks=options.ranks)
    with Job(plan) as job:
        job.finish(timeout=120)
    found = [json.loads((plan.folder / f"micro-{rank}.json").read_text()) for rank in range(options.ranks)]
    gates = list(zip(*(rank["gates"] for rank in found), strict=True))
    issued = [max(rank["issued_us"][part] for rank in found) for part in (0, 1)]
    return {
        "gate_us": median(min(left for _, left in gate) - max(came for came, _ in gate) for gate in gates),
        "gate_last_us": median(
            max(left for _, left in gate) - max(came for came, _ in gate) for gate in gates
        ),
        "call_us": max(rank["call_us"] for rank in found),
        "optimizer_step_us": max(rank["plain_step_us"] for rank in found),
        "collective_us": {
            "native": max(rank["native_us"] for rank in found),
            "elastic": max(rank["native_us"] for rank in found) + max(rank["added_us"] for rank in found),
        },
        **({"issued_us": {"native": issued[0], "elastic": sum(issued)}} if issued[0] else {}),
    }


def show(report: dict[str, Any], options: argparse.Namespace) -> None:
    for part in (report, report.get("compute_bound")):
        if part:
            low, high = part["overhead_interval_percent"]
            print(
                f"steps of {part['step_ms']['plain']:.1f} ms, {part['step_ms']['protected']:.1f} ms protected: "
                f"{part['overhead_percent']:+.2f} % (95 %: {low:+.2f} to {high:+.2f}, {part['pairs']} pairs)"
            )
    native, elastic = report["collective_us"]["native"], report["collective_us"]["elastic"]
    print(f"the last rank leaves a gate after {report['gate_last_us']:.0f} us")
    print(
        f"a replayable call of optimizer.step(): {report['call_us']:.0f} us more than the "
        f"{report['optimizer_step_us']:.0f} us of that step; all_reduce: {native:.0f} us native"
    )
    print_bars(
        [
            Bar("overhead", report["overhead_percent"], 1.0, " %"),
            Bar(f"gate of {options.ranks} ranks", report["gate_us"], 250, " us"),
            Bar("elastic over native collective", elastic - native, 20, " us"),
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
    parser.add_argument("--seconds", type=float, default=120, help="time for the turns (default 120)")
    parser.add_argument("--turn", type=float, default=0.6, help="seconds of one turn (default 0.6)")
    parser.add_argument("--mirror-every", type=int, default=0, help="measure the cost of mirrors, see above")
    parser.add_argument(
        "--rounds", type=int, default=3, help="with --mirror-every: jobs of each kind (default 3)"
    )
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="steady-state-") as folder:
        if options.mirror_every:
            cost = mirror_cost.measure(options.mirror_every, options.ranks, options.rounds, Path(folder))
            report = {**cost, **provenance()}
            mirror_cost.show(report)
        else:
            report = measure(options, Path(folder))
            show(report, options)
    write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
