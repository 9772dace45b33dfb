"""Strikes one job with many faults of random kinds at random moments, and compares it with a run without
faults.

Ranks die by SIGKILL, segmentation fault, os._exit, exception and a kill with full memory; one of them, rank
0, several, all but one, the same again, or the replacement of a lost rank before it has joined; while data is
loaded, in forward, in backward, between ready and commit, inside optimizer.step(), after the gate, in
evaluation, in checkpoint saving, in the last step, after the loop, and by wall clock from outside. The seed
draws the schedule. Parameters, optimizer state, scheduler and all random number generators are compared bit
for bit at the end. Exit code 0 only if every fault was survived and the comparison holds.

--layout spreads the model over the ranks: shards, tensor and pipeline parallel. Each part then keeps a living rank,
whatever strikes at once ("all but one" is as many ranks as that allows), so that no fault needs the job to start
over. With fsdp each rank has a part that no other has: only mirrors can bring it back (--mirror-every).

--nodes runs the job on several hosts (network namespaces, so it needs root) with --spares more that wait. A part of the
faults then strikes a whole node: it loses its power, falls silent, or its agent is paused for some seconds or killed.
Afterwards it comes back with a fresh agent, which is the next spare; half of those that fell silent are reachable again
before that. The node of the embedded store is left alone; with --store etcd no node is.

A --script of yours is struck by wall clock only, and judged by its files:"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import psutil
from harness import etcd, hosts
from harness.cluster import Cluster, start
from harness.job import OURS, TORCHRUN, Job, JobFailedError, Plan, Running, ignore_gone
from harness.layouts import LAYOUTS, Holders, holders, survivable
from harness.node_faults import NodeFaults
from harness.recoveries import Recovery, read_recoveries
from harness.report import write_json
from harness.schedule import schedule, steps_needed, with_nodes
from harness.steps import Logs, interruption, newest_process, progress, read_logs
from harness.weights import folder_differences
from jobs.faults import CLOCK, KINDS, NODE_KINDS, Fault, claim, marker, write_schedule

from checkpointless_elastic.observe.machine import provenance

DEFAULT_SCRIPT = Path(__file__).parent / "jobs" / "chaos_job.py"


@dataclass(frozen=True)
class Outcome:
    """What one fault did.

    Attributes:
        fault: as it was scheduled.
        rung: how the library answered; None when no record names it.
        seconds: from the fault to the first step committed by all ranks; None when that was not seen.
        struck: whether it came to pass.
    """

    fault: Fault
    rung: int | None
    seconds: float | None
    struck: bool

    def entry(self) -> dict[str, object]:
        fault = self.fault
        return {
            "kind": fault.kind,
            "moment": fault.moment,
            "rung": self.rung,
            "seconds": self.seconds,
            "target": fault.target,
            "ranks": list(fault.ranks),
            "step": fault.step,
            "struck": self.struck,
        }

    def __str__(self) -> str:
        fault = self.fault
        place = f"ranks {fault.ranks} ({fault.target}), {fault.moment}, step {fault.step}"
        rung = f"rung {self.rung}" if self.rung else "no record"
        seconds = f"{self.seconds:.3f} s" if self.seconds is not None else "no step after it"
        return f"{fault.number:3} {fault.kind:<13} {place:<62} {rung}, {seconds if self.struck else 'not struck'}"


class Clock(threading.Thread):
    """Strikes from outside, one fault after the other, as soon as the job has come to their step."""

    def __init__(self, job: Running, faults: Sequence[Fault]) -> None:
        super().__init__(daemon=True)
        self._job = job
        self._faults = [fault for fault in faults if fault.moment == CLOCK and fault.kind not in NODE_KINDS]

    def run(self) -> None:
        folder, ranks = self._job.plan.folder, self._job.plan.ranks
        for fault in self._faults:
            try:
                self._job.until(lambda step=fault.step: progress(folder, ranks) >= step, timeout=600)
            except JobFailedError:
                return  # the main thread sees the same and reports it
            time.sleep(fault.delay)
            for rank in fault.ranks:
                self._strike(fault, rank)

    def _strike(self, fault: Fault, rank: int) -> None:
        """Waits for a living process of the rank, which may be lost to another fault just now, and kills it."""
        folder = self._job.plan.folder
        number = signal.SIGSEGV if fault.kind == "SIGSEGV" else signal.SIGKILL
        struck = False
        while not struck and self._job.running():
            with ignore_gone():
                pid = newest_process(folder, rank)
                struck = pid is not None and self._kill(pid, number)
            if struck:
                claim(marker(folder, fault.number, rank))
            time.sleep(0 if struck else 0.002)

    def _kill(self, pid: int, number: int) -> bool:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.send_signal(number)
        return True


def struck_at(folder: Path, fault: Fault) -> list[int]:
    """When the fault struck each of its ranks so far, in nanoseconds."""
    paths = [marker(folder, fault.number, rank) for rank in fault.ranks]
    return [int(text) for path in paths if path.exists() and (text := path.read_text())]


def as_struck(folder: Path, fault: Fault) -> Fault:
    """A node's fault with the ranks that it took; others as they are."""
    if fault.kind not in NODE_KINDS:
        return fault
    taken = (path.name.split("-")[1] for path in folder.glob(f"faults/{fault.number}-*"))
    return replace(fault, ranks=tuple(sorted(map(int, taken))))


def run_struck(plan: Plan, faults: Sequence[Fault], seed: int, timeout: float) -> int:
    """The job with faults; prints each one as it strikes. Returns the exit code."""
    write_schedule(plan.folder, faults)
    end = time.monotonic() + timeout
    with start(plan) as job:
        Clock(job, faults).start()
        nodes = NodeFaults(job, faults, seed) if isinstance(job, Cluster) else None
        if nodes:
            nodes.start()
        watch(job, faults, end)
        if nodes:
            nodes.join(60)
            if nodes.error:
                raise nodes.error
        code = job.code(timeout=1)
        if code:
            print(job.tail(), file=sys.stderr)
        return code


def watch(job: Running, faults: Sequence[Fault], end: float) -> None:
    """Prints each fault as it strikes, until the job has ended or its time is over."""
    waiting = list(faults)
    while job.running() and time.monotonic() < end:
        now = {fault.number: as_struck(job.plan.folder, fault) for fault in waiting}
        for fault in [fault for fault in waiting if struck_at(job.plan.folder, now[fault.number])]:
            waiting.remove(fault)
            done, ranks = len(faults) - len(waiting), now[fault.number].ranks
            where = f"ranks {', '.join(map(str, ranks))} ({fault.target}), {fault.moment}"
            print(f"{done}/{len(faults)} {fault.kind} of {where}, step {fault.step}", flush=True)
        time.sleep(0.05)


def outcome(fault: Fault, folder: Path, logs: Logs, recoveries: Sequence[Recovery]) -> Outcome:
    times = struck_at(folder, fault)
    if not times:
        return Outcome(fault, None, None, struck=False)
    end = end_of(logs, fault, max(times))
    seconds = (end - min(times)) / 1e9 if end else None
    answers = (
        recovery.rung
        for recovery in recoveries
        if set(fault.ranks) & set(recovery.lost_ranks) and recovery.time + recovery.seconds > max(times) / 1e9
    )
    return Outcome(fault, next(answers, None), seconds, struck=True)


def end_of(logs: Logs, fault: Fault, struck_ns: int) -> int | None:
    """When all ranks had committed a common step after the fault, in nanoseconds; None if they never did. After the
    last step the others may have finished before the fault: then when the struck ranks had finished too."""
    cost = interruption(logs, struck_ns)
    if cost is not None:
        return struck_ns + round(cost.seconds * 1e9)
    later = [[c.time_ns for c in logs[rank] if c.time_ns > struck_ns] for rank in fault.ranks]
    return max(min(times) for times in later) if all(later) else None


def parts_of(options: argparse.Namespace) -> Holders | None:
    """Which ranks hold the same, for the schedule; None where any living rank is enough."""
    if options.layout == "ddp" or options.mirror_every:
        return None
    return holders(options.layout, options.ranks)


def plans(options: argparse.Namespace, folder: Path, steps: int) -> tuple[Plan, Plan]:
    """The run without faults, and the struck one."""
    environment = {"BENCH_LAYOUT": options.layout}
    calm = Plan(
        TORCHRUN, options.script, folder / "calm", options.ranks, steps, environment=dict(environment)
    )
    if options.mirror_every:
        environment["CHECKPOINTLESS_MIRROR_EVERY"] = str(options.mirror_every)
    struck = Plan(
        OURS,
        options.script,
        folder / "struck",
        options.ranks,
        steps,
        max_restarts=options.faults,
        environment=environment,
        nodes=options.nodes,
        spares=options.spares,
        store=options.store,
    )
    return calm, struck


def draw(options: argparse.Namespace, steps: int) -> list[Fault]:
    """The schedule of the struck run."""
    own, parts = options.script != DEFAULT_SCRIPT, parts_of(options)
    of_workers = options.faults - options.node_faults
    workers = schedule(of_workers, options.seed, options.ranks, steps, options.kinds, own, parts)
    return with_nodes(workers, options.node_faults, options.seed, steps)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Both runs and their comparison, as the report."""
    steps = options.steps or steps_needed(options.faults)
    faults, parts = draw(options, steps), parts_of(options)
    calm, struck = plans(options, folder, steps)
    print(
        f"{options.layout}, seed {options.seed}: {len(faults)} faults in {steps} steps; first a run without faults ...",
        flush=True,
    )
    with Job(calm) as job:
        job.finish()
    code = run_struck(struck, faults, options.seed, options.timeout)
    logs, recoveries = (
        read_logs(struck.folder, options.ranks),
        read_recoveries(struck.folder / "recoveries.jsonl"),
    )
    outcomes = [outcome(as_struck(struck.folder, fault), struck.folder, logs, recoveries) for fault in faults]
    found = folder_differences(calm.folder, struck.folder, options.ranks)
    for difference in found[:5]:
        print(difference, file=sys.stderr)
    survived = sum(o.struck and (code == 0 or o.seconds is not None) for o in outcomes)
    return {
        "faults": sum(o.struck for o in outcomes),
        "survived": survived,
        "equal": not found,
        "longest_interruption_s": max((o.seconds for o in outcomes if o.seconds is not None), default=None),
        "layout": options.layout,
        "stranded": sum(not survivable(r.lost_ranks, parts) for r in recoveries) if parts else 0,
        "seed": options.seed,
        "nodes": options.nodes,
        "node_faults": options.node_faults,
        "fault_list": [o.entry() for o in outcomes],
        "faults_asked_for": options.faults,
        "exit_code": code,
        "rungs": dict(Counter(str(o.rung) for o in outcomes if o.struck)),
        "lines": [str(o) for o in outcomes],
        **provenance(),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    contract = (harness.__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description=f"{__doc__}\n{contract}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="draws the schedule (default 0)")
    parser.add_argument("--ranks", type=int, help="workers (default 4; 2 for each of --nodes)")
    parser.add_argument("--nodes", type=int, default=1, help="hosts with ranks (default 1: this machine)")
    parser.add_argument("--spares", type=int, help="hosts that wait (default 1 with several nodes)")
    parser.add_argument(
        "--node-faults", type=int, help="how many of the faults strike nodes (default: each fourth)"
    )
    parser.add_argument("--store", choices=("c10d", "etcd"), default="c10d", help="with several nodes")
    parser.add_argument("--layout", choices=LAYOUTS, default="ddp", help="of the model (default ddp)")
    parser.add_argument("--mirror-every", type=int, default=0, help="steps between mirrors, for fsdp")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="only these kinds")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--script", type=Path, default=DEFAULT_SCRIPT, help="another training script")
    parser.add_argument("--steps", type=int, help="BENCH_STEPS (default: what the faults need)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the struck run (default 600)")
    parser.add_argument("--keep", type=Path, help="keep the jobs' folders here")
    options = parser.parse_args(arguments)
    settle(parser, options)
    try:
        holders(options.layout, options.ranks)
    except ValueError as error:
        parser.error(str(error))
    if options.layout == "fsdp" and not options.mirror_every:
        parser.error(
            "With fsdp a lost rank's shard is nowhere else: give --mirror-every K to keep mirrors of it."
        )
    return options


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fills in what depends on the number of nodes, and ends the program when that makes no sense."""
    several = options.nodes > 1
    options.ranks = options.ranks or (2 * options.nodes if several else 4)
    options.spares = (1 if several else 0) if options.spares is None else options.spares
    every_fourth = options.faults // 4 if several else 0
    options.node_faults = every_fourth if options.node_faults is None else options.node_faults
    if options.node_faults and not (several and options.spares):
        parser.error("faults of nodes need --nodes 2 or more, and a spare")
    if several and (options.layout != "ddp" or options.ranks % options.nodes):
        parser.error("several nodes take the layout ddp and a multiple of their number of --ranks")


def obstacle(options: argparse.Namespace) -> str:
    """Why this cannot be done on this machine; empty where it can."""
    if options.nodes + options.spares == 1:
        return ""
    return hosts.supported() or (etcd.supported() if options.store == "etcd" else "")


def main() -> int:
    options = parse()
    if reason := obstacle(options):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        report = measure(options, options.keep or Path(folder))
    lines = report.pop("lines")
    assert isinstance(lines, list)
    print("\n".join(["", *lines, ""]))
    print(f"{report['survived']} of {report['faults']} faults survived, rungs {report['rungs']}")
    print(f"longest interruption {report['longest_interruption_s']} s")
    print("equal" if report["equal"] else "not equal")
    write_json(options.json, report)
    good = (
        report["equal"]
        and report["survived"] == report["faults"] == options.faults
        and not report["exit_code"]
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
