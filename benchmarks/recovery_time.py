"""How long does a killed worker interrupt training? Ours and plain torchrun, side by side in one run.

One round is a job of --ranks workers in which a random rank is killed by SIGKILL at a random moment after
warm-up. The interruption lasts from the kill until all ranks, the lost one included, have committed one and
the same step. Plain torchrun restarts its workers, and the script goes on from a checkpoint on the local disk
that it writes every 10 steps (--checkpoint-every); our launcher uses none. Plain torchrun gets
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which it does not come back on gloo. Rounds of ours and of
torchrun alternate. What each job ends with is compared bit for bit with a run of plain torchrun without a
fault.

A script given by --script is judged by the files that it writes:
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import harness
from harness.job import OURS, TORCHRUN, Job, JobFailedError, Plan
from harness.machine import provenance
from harness.recoveries import Recovery, phase_medians, read_recoveries, timeline
from harness.report import Bar, print_bars, write_json
from harness.steps import Interruption, interruption, last_line, progress, read_logs
from harness.weights import folder_differences

DEFAULT_SCRIPT = Path(__file__).parent / "jobs" / "ddp.py"


@dataclass(frozen=True)
class Round:
    """One job with one kill.

    Attributes:
        backend: launcher.
        rank: the rank that was killed.
        seconds: the interruption.
        step: first step that all ranks committed after the kill.
        lost_steps: steps computed again.
        memory: bytes of the whole job just before the kill.
        equal: ended with the bits of the run without a fault.
    """

    backend: str
    rank: int
    seconds: float
    step: int
    lost_steps: int
    memory: int
    equal: bool


class Bench:
    """Runs the jobs of one measurement in folders below one folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.random = random.Random(options.seed)
        self.rounds: list[Round] = []
        self.recoveries: list[Recovery] = []
        self.plain_memory = 0

    def plan(self, backend: str, name: str) -> Plan:
        return Plan(
            backend=backend,
            script=self.options.script,
            folder=self.folder / name,
            ranks=self.options.ranks,
            steps=self.options.steps,
            checkpoint_every=self.options.checkpoint_every if backend == TORCHRUN else 0,
        )

    def reference(self) -> None:
        """The run without a fault: what all others are compared with."""
        with Job(self.plan(TORCHRUN, "reference")) as job:
            self.warm_up(job)
            self.plain_memory = job.memory()
            job.finish()

    def warm_up(self, job: Job) -> None:
        folder, ranks = job.plan.folder, job.plan.ranks
        job.until(lambda: progress(folder, ranks) >= self.options.warm_up, timeout=180)

    def measure(self, backend: str, number: int) -> Round:
        rank = self.random.randrange(self.options.ranks)
        with Job(self.plan(backend, f"{backend}-{number}")) as job:
            self.warm_up(job)
            memory = job.memory()
            time.sleep(self.random.uniform(0, self.options.spread))
            killed_ns = kill(job.plan.folder, rank)
            job.finish()
        cost = self.judge(job.plan.folder, killed_ns)
        found = folder_differences(self.folder / "reference", job.plan.folder, self.options.ranks)
        for difference in found[:3] if backend == OURS else ():
            print(f"    {difference}", file=sys.stderr)
        self.recoveries += read_recoveries(job.plan.folder / "recoveries.jsonl")
        return Round(backend, rank, cost.seconds, cost.step, cost.lost_steps, memory, not found)

    def judge(self, folder: Path, killed_ns: int) -> Interruption:
        cost = interruption(read_logs(folder, self.options.ranks), killed_ns)
        if cost is None:
            raise JobFailedError(
                f"The job in {folder} logged no common step of all ranks after the kill; give it more --steps."
            )
        return cost

    def run(self) -> None:
        print("a run without a fault, by plain torchrun ...", flush=True)
        self.reference()
        for number in range(self.options.repeats):
            for backend in (OURS, TORCHRUN):
                result = self.measure(backend, number)
                self.rounds.append(result)
                print(
                    f"round {number + 1} {backend:<15} rank {result.rank} killed: {result.seconds:7.3f} s, "
                    f"{result.lost_steps} step(s) done again, {'equal' if result.equal else 'not equal'}",
                    flush=True,
                )

    def of(self, backend: str) -> list[Round]:
        return [result for result in self.rounds if result.backend == backend]

    def report(self) -> dict[str, object]:
        ours, theirs = self.of(OURS), self.of(TORCHRUN)
        ours_s, theirs_s = (median(r.seconds for r in rounds) for rounds in (ours, theirs))
        beyond = (median(r.memory for r in ours) - self.plain_memory) / self.options.ranks
        return {
            "ours_median_s": ours_s,
            "torchrun_median_s": theirs_s,
            "ratio": theirs_s / ours_s,
            "phases": phase_medians(self.recoveries),
            "lost_steps": median(r.lost_steps for r in ours),
            "equal": all(r.equal for r in ours),
            "memory_per_worker_mib": round(beyond / 2**20, 1),
            "torchrun_lost_steps": median(r.lost_steps for r in theirs),
            "torchrun_equal": all(r.equal for r in theirs),
            "ranks": self.options.ranks,
            "rounds": [asdict(result) for result in self.rounds],
            **provenance(),
        }


def kill(folder: Path, rank: int) -> int:
    """Kills the rank's newest process and returns the time just before."""
    commit = last_line(folder / f"steps-{rank}.log")
    if commit is None:
        raise JobFailedError(f"Rank {rank} has logged no step in {folder}, so its process is not known.")
    now = time.time_ns()
    os.kill(commit.pid, signal.SIGKILL)
    return now


def show(bench: Bench, report: dict[str, object]) -> None:
    for recovery in bench.recoveries[-1:]:
        print(f"\nthe last recovery of ours:\n{timeline(recovery)}")
    phases = report["phases"]
    assert isinstance(phases, dict)
    print(
        "\nphase medians: " + ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in phases.items())
    )
    print(f"memory per worker beyond the plain job: {report['memory_per_worker_mib']} MiB")
    print(f"torchrun: {report['torchrun_median_s']:.3f} s, ours: {report['ours_median_s']:.3f} s (medians)")
    print_bars(
        [
            Bar("ratio", float(str(report["ratio"])), 20, at_least=True),
            Bar("our median", float(str(report["ours_median_s"])), 0.30, " s"),
        ]
    )
    print("equal" if report["equal"] else "not equal")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    contract = (harness.__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{contract}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="workers (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each launcher (default 5)")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--script", type=Path, default=DEFAULT_SCRIPT, help="another training script")
    parser.add_argument("--seed", type=int, default=0, help="chooses ranks and moments (default 0)")
    parser.add_argument("--steps", type=int, help="BENCH_STEPS (default 50; 24 with more than 8 ranks)")
    parser.add_argument(
        "--warm-up", type=int, help="steps before the kill (default 15; 6 with more than 8 ranks)"
    )
    parser.add_argument(
        "--spread", type=float, default=0.3, help="kill up to so many seconds later (default 0.3)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=10, help="plain torchrun's checkpoints (default 10)"
    )
    parser.add_argument("--keep", type=Path, help="keep the jobs' folders here")
    options = parser.parse_args(arguments)
    steps, warm_up = (50, 15) if options.ranks <= 8 else (24, 6)
    options.steps = options.steps or steps
    options.warm_up = options.warm_up or min(warm_up, options.steps // 2)
    return options


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="recovery-time-") as folder:
        bench = Bench(options, options.keep or Path(folder))
        bench.run()
    report = bench.report()
    show(bench, report)
    write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
