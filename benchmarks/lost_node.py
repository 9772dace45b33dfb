"""How long does a lost node interrupt training? The part of recovery_time.py that runs jobs on several hosts.

One round is a job in which a random node with ranks is cut off at a random moment after warm-up: its packets are
dropped, nothing is closed. The interruption lasts from the cut until all ranks have committed one and the same step.
Its first part, detection, ends when the coordinator has seen the loss, as its record of the recovery says. The node
of the embedded store is not cut off; with --store etcd any node is, and the coordinator's node too."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from harness import etcd, hosts
from harness.cluster import Cluster, Node, start
from harness.job import OURS, TORCHRUN, JobFailedError, Plan
from harness.recoveries import (
    Recovery,
    phase_medians,
    read_recoveries,
    timeline,
    transfer_medians,
)
from harness.report import Bar, print_bars, write_json
from harness.steps import interruption, progress, read_logs
from harness.weights import folder_differences

from checkpointless_elastic.observe.machine import provenance

LIMIT = 1.5  # seconds without detection, with a warm spare
JOBS = Path(__file__).parent / "jobs"


@dataclass(frozen=True)
class Round:
    """One job with one cut.

    Attributes:
        node: number of the node that was cut off.
        ranks: those that ran on it.
        coordinated: whether its agent coordinated the job.
        seconds: the interruption.
        detection: how much of it went by until the loss was seen.
        step: first step that all ranks committed after the cut.
        lost_steps: steps computed again.
        equal: ended with the bits of the run without a fault.
    """

    node: int
    ranks: tuple[int, ...]
    coordinated: bool
    seconds: float
    detection: float
    step: int
    lost_steps: int
    equal: bool

    @property
    def recovery(self) -> float:
        return self.seconds - self.detection

    def __str__(self) -> str:
        who = "the coordinator's node" if self.coordinated else "node"
        return (
            f"{who} {self.node} with ranks {', '.join(map(str, self.ranks))} cut off: {self.seconds:.3f} s, of which "
            f"{self.detection:.3f} s until it was seen; {self.lost_steps} step(s) done again, "
            f"{'equal' if self.equal else 'not equal'}"
        )


class Bench:
    """Runs the jobs in folders below one folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.layout = options.layout[0]
        self.random = random.Random(options.seed)
        self.rounds: list[Round] = []
        self.recoveries: list[Recovery] = []

    def plan(self, backend: str, name: str) -> Plan:
        several = backend == OURS
        script = JOBS / ("ddp.py" if self.layout == "ddp" else "layout.py")
        return Plan(
            backend,
            self.options.script or script,
            self.folder / name,
            self.options.ranks,
            self.options.steps,
            environment={"BENCH_LAYOUT": self.layout},
            nodes=self.options.nodes if several else 1,
            spares=self.options.spares if several else 0,
            store=self.options.store,
        )

    def reference(self) -> None:
        with start(self.plan(TORCHRUN, "reference")) as job:
            job.finish()

    def round(self, number: int) -> None:
        with start(self.plan(OURS, f"{OURS}-{number}")) as job:
            assert isinstance(job, Cluster)
            folder, ranks = job.plan.folder, job.plan.ranks
            job.until(lambda: progress(folder, ranks) >= self.options.warm_up, timeout=180)
            time.sleep(self.random.uniform(0, self.options.spread))
            node = self.choose(job)
            lost, coordinated = tuple(job.ranks_of(node)), job.coordinator() is node
            cut_ns = time.time_ns()
            job.cut(node)
            job.finish()
        self.rounds.append(self.judge(folder, node, lost, coordinated, cut_ns))
        print(f"round {number + 1} {self.rounds[-1]}", flush=True)

    def choose(self, job: Cluster) -> Node:
        return self.random.choice([n for n in job.nodes if job.ranks_of(n) and not job.holds_store(n)])

    def judge(self, folder: Path, node: Node, lost: tuple[int, ...], coordinated: bool, cut_ns: int) -> Round:
        recoveries = read_recoveries(folder / "recoveries.jsonl")
        if not recoveries:
            raise JobFailedError(f"The job in {folder} has no recovery after the cut; give it more --steps.")
        seen_ns = int(recoveries[0].time * 1e9)  # a step in flight at the cut may still have been committed
        cost = interruption(read_logs(folder, self.options.ranks), seen_ns)
        if cost is None:
            raise JobFailedError(
                f"The job in {folder} has no common step of all ranks after the loss was seen."
            )
        self.recoveries += recoveries
        found = folder_differences(self.folder / "reference", folder, self.options.ranks)
        for difference in found[:3]:
            print(f"    {difference}", file=sys.stderr)
        detection = (seen_ns - cut_ns) / 1e9
        seconds = detection + cost.seconds
        return Round(
            node.number, lost, coordinated, seconds, detection, cost.step, cost.lost_steps, not found
        )

    def report(self) -> dict[str, object]:
        return {
            "fault": "node",
            "nodes": self.options.nodes,
            "spares": self.options.spares,
            "store": self.options.store,
            "layout": self.layout,
            "ranks": self.options.ranks,
            "ours_median_s": self.median(lambda round: round.seconds),
            "detection_s": self.median(lambda round: round.detection),
            "recovery_s": self.median(lambda round: round.recovery),
            "phases": phase_medians(self.recoveries),
            "lost_steps": self.median(lambda round: round.lost_steps),
            "equal": all(round.equal for round in self.rounds),
            "rungs": dict(Counter(str(recovery.rung) for recovery in self.recoveries)),
            **transfer_medians(self.recoveries),
            "rounds": [asdict(round) for round in self.rounds],
            **provenance(),
        }

    def median(self, of: Callable[[Round], float]) -> float:
        return median(of(round) for round in self.rounds)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fault", choices=("worker", "node"), default="worker", help="(default worker)")
    parser.add_argument("--nodes", type=int, default=1, help="hosts with ranks, for --fault node (default 1)")
    parser.add_argument("--spares", type=int, default=1, help="hosts that wait, for --fault node (default 1)")
    parser.add_argument("--store", choices=("c10d", "etcd"), default="c10d", help="for --fault node")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program when the options of several nodes make no sense."""
    if options.fault == "worker" and options.nodes > 1:
        parser.error("--nodes goes with --fault node")
    if options.fault == "node" and (options.nodes < 2 or options.spares < 1):
        parser.error("--fault node needs --nodes 2 or more, and a spare")
    if options.ranks % options.nodes:
        parser.error(f"--ranks must be a multiple of the {options.nodes} nodes")
    if options.fault == "node" and len(options.layout) > 1:
        parser.error("--fault node takes one layout")


def obstacle(options: argparse.Namespace) -> str:
    """Why this cannot be measured on this machine; empty where it can."""
    return hosts.supported() or (etcd.supported() if options.store == "etcd" else "")


def main(options: argparse.Namespace) -> int:
    if reason := obstacle(options):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lost-node-") as folder:
        bench = Bench(options, options.keep or Path(folder))
        print("a run without a fault, by plain torchrun on one host ...", flush=True)
        bench.reference()
        for number in range(options.repeats):
            bench.round(number)
    report = bench.report()
    show(bench, report)
    write_json(options.json, report)
    return 0


def show(bench: Bench, report: dict[str, object]) -> None:
    print(f"\nthe last recovery:\n{timeline(bench.recoveries[-1])}")
    print(f"detection {report['detection_s']:.3f} s, interruption {report['ours_median_s']:.3f} s (medians)")
    print_bars([Bar("without detection", float(str(report["recovery_s"])), LIMIT, " s")])
    print("equal" if report["equal"] else "not equal")
