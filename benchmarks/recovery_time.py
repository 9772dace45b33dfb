"""How long does a killed worker interrupt training? Ours and plain torchrun, side by side in one run.

One round is a job of --ranks workers in which a random rank is killed by SIGKILL at a random moment after
warm-up. The interruption lasts from the kill until all ranks, the lost one included, have committed one and
the same step. Plain torchrun restarts its workers, and the script goes on from a checkpoint on the local disk
that it writes every 10 steps (--checkpoint-every); our launcher uses none. Plain torchrun gets
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which it does not come back on gloo. Rounds of ours and of
torchrun alternate. What each job ends with is compared bit for bit with a run of plain torchrun without a
fault.

--layout spreads a model of the same size over the ranks in another way; several layouts, as in --layout ddp,hsdp,
are measured in turns and compared. With fsdp and zero a lost rank's part is nowhere else: the script is run
again from its top, and ours gets the checkpoint too; with CHECKPOINTLESS_MIRROR_EVERY=1 it comes from mirrors.

--fault node with --nodes 2 cuts a whole node off instead, in a job of several hosts (network namespaces, so it needs
root) with a warm spare: see lost_node.py. Its JSON gives detection_s, from the cut until the coordinator saw the loss,
and recovery_s, the rest, apart. Plain torchrun has no part in it: it waits minutes for a silent peer.

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
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import harness
import lost_node
from harness.job import OURS, TORCHRUN, Job, JobFailedError, Plan
from harness.layouts import ALONE, LAYOUTS, holders
from harness.memcpy import memcpy_bandwidth
from harness.recoveries import Recovery, phase_medians, read_recoveries, timeline, transfer_medians
from harness.report import Bar, print_bars, write_json
from harness.steps import Interruption, interruption, last_line, progress, read_logs
from harness.weights import folder_differences

from checkpointless_elastic.observe.machine import provenance

JOBS = Path(__file__).parent / "jobs"
SCRIPTS = {layout: JOBS / ("ddp.py" if layout == "ddp" else "layout.py") for layout in LAYOUTS}
SLOWER = 2.0  # hsdp may take so many times as long as ddp
OF_MEMCPY = 0.7


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
    """Runs the jobs of one layout in folders below one folder."""

    def __init__(self, options: argparse.Namespace, layout: str, folder: Path) -> None:
        self.options = options
        self.layout = layout
        self.folder = folder
        self.random = random.Random(options.seed)
        self.rounds: list[Round] = []
        self.recoveries: list[Recovery] = []
        self.copies: list[float] = []  # transfers of recoveries, as parts of a plain copy's bandwidth
        self.plain_memory = 0

    def plan(self, backend: str, name: str) -> Plan:
        return Plan(
            backend=backend,
            script=self.options.script or SCRIPTS[self.layout],
            folder=self.folder / name,
            ranks=self.options.ranks,
            steps=self.options.steps,
            checkpoint_every=self.options.checkpoint_every
            if backend == TORCHRUN or self.layout in ALONE
            else 0,
            environment={"BENCH_LAYOUT": self.layout},
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
        recoveries = read_recoveries(job.plan.folder / "recoveries.jsonl")
        self.recoveries += recoveries
        self.copies += [of_memcpy(recovery) for recovery in recoveries if recovery.transfer_seconds]
        return Round(backend, rank, cost.seconds, cost.step, cost.lost_steps, memory, not found)

    def judge(self, folder: Path, killed_ns: int) -> Interruption:
        cost = interruption(read_logs(folder, self.options.ranks), killed_ns)
        if cost is None:
            raise JobFailedError(
                f"The job in {folder} logged no common step of all ranks after the kill; give it more --steps."
            )
        return cost

    def round(self, number: int) -> None:
        for backend in (OURS, TORCHRUN):
            result = self.measure(backend, number)
            self.rounds.append(result)
            print(
                f"round {number + 1} {self.layout} {backend:<15} rank {result.rank} killed: {result.seconds:7.3f} s, "
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
            "layout": self.layout,
            "ours_median_s": ours_s,
            "torchrun_median_s": theirs_s,
            "ratio": theirs_s / ours_s,
            "phases": phase_medians(self.recoveries),
            "lost_steps": median(r.lost_steps for r in ours),
            "equal": all(r.equal for r in ours),
            "memory_per_worker_mib": round(beyond / 2**20, 1),
            "torchrun_lost_steps": median(r.lost_steps for r in theirs),
            "torchrun_equal": all(r.equal for r in theirs),
            "rungs": dict(Counter(str(recovery.rung) for recovery in self.recoveries)),
            **self.transfers(),
            "ranks": self.options.ranks,
            "rounds": [asdict(result) for result in self.rounds],
            **provenance(),
        }

    def transfers(self) -> dict[str, object]:
        return {
            **transfer_medians(self.recoveries),
            "bandwidth_vs_memcpy": median(self.copies) if self.copies else None,
        }


def of_memcpy(recovery: Recovery) -> float:
    """Bytes per second, copied and verified, of those that one thread copies plainly now that the job has ended."""
    moved = recovery.bytes_moved / len(recovery.lost_ranks)
    return moved / recovery.transfer_seconds / memcpy_bandwidth(int(moved))


def kill(folder: Path, rank: int) -> int:
    """Kills the rank's newest process and returns the time just before."""
    commit = last_line(folder / f"steps-{rank}.log")
    if commit is None:
        raise JobFailedError(f"Rank {rank} has logged no step in {folder}, so its process is not known.")
    now = time.time_ns()
    os.kill(commit.pid, signal.SIGKILL)
    return now


def show(bench: Bench, report: dict[str, object]) -> None:
    print(f"\n{bench.layout}, answered by rungs {report['rungs']}")
    for recovery in bench.recoveries[-1:]:
        print(f"the last recovery of ours:\n{timeline(recovery)}")
    phases = report["phases"]
    assert isinstance(phases, dict)
    print(
        "\nphase medians: " + ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in phases.items())
    )
    print(
        f"process groups of a rank: {report['groups_kept']:g} kept, {report['groups_rebuilt']:g} rebuilt, "
        f"{report['groups_lazy']:g} left to their first use"
    )
    print(f"memory per worker beyond the plain job: {report['memory_per_worker_mib']} MiB")
    print(f"torchrun: {report['torchrun_median_s']:.3f} s, ours: {report['ours_median_s']:.3f} s (medians)")
    bars = [
        Bar("ratio", float(str(report["ratio"])), 20, at_least=True),
        Bar("our median", float(str(report["ours_median_s"])), 0.30, " s"),
    ]
    if report["bandwidth_vs_memcpy"] is not None:
        name = f"transfer of {int(float(str(report['bytes_moved']))) >> 20} MiB, of a plain copy's bandwidth"
        bars.append(Bar(name, float(str(report["bandwidth_vs_memcpy"])), OF_MEMCPY, at_least=True))
    print_bars(bars)
    print("equal" if report["equal"] else "not equal")


def together(reports: dict[str, dict[str, object]]) -> dict[str, object]:
    """One report of all layouts; that of a single one as it is. Prints how they compare."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    first, *others = reports
    slower = {
        layout: float(str(reports[layout]["ours_median_s"])) / float(str(reports[first]["ours_median_s"]))
        for layout in others
    }
    print()
    print_bars([Bar(f"{layout}, times as long as {first}", slower[layout], SLOWER) for layout in others])
    return {"layouts": reports, "times_as_long": slower, "compared_with": first, **provenance()}


def layouts_of(text: str) -> list[str]:
    """Names of layouts, separated by commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(LAYOUTS)}")
    return names


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    contract = (harness.__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{contract}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="workers (default 4)")
    parser.add_argument(
        "--layout",
        type=layouts_of,
        default=["ddp"],
        help=f"of {', '.join(LAYOUTS)}; several with commas (default ddp)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each launcher (default 5)")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--script", type=Path, help="another training script")
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
    lost_node.add_options(parser)
    parser.add_argument("--keep", type=Path, help="keep the jobs' folders here")
    options = parser.parse_args(arguments)
    steps, warm_up = (50, 15) if options.ranks <= 8 else (24, 6)
    options.steps = options.steps or steps
    options.warm_up = options.warm_up or min(warm_up, options.steps // 2)
    for layout in options.layout:
        try:
            holders(layout, options.ranks)
        except ValueError as error:
            parser.error(str(error))
    lost_node.check(parser, options)
    return options


def main() -> int:
    options = parse()
    if options.fault == "node":
        return lost_node.main(options)
    with tempfile.TemporaryDirectory(prefix="recovery-time-") as folder:
        place = options.keep or Path(folder)
        benches = [Bench(options, layout, place / layout) for layout in options.layout]
        print("runs without a fault, by plain torchrun ...", flush=True)
        for bench in benches:
            bench.reference()
        for number in range(options.repeats):
            for bench in benches:
                bench.round(number)
    reports = {bench.layout: bench.report() for bench in benches}
    for bench in benches:
        show(bench, reports[bench.layout])
    write_json(options.json, together(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
