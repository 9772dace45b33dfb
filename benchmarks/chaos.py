"""Strikes one job with many faults of random kinds at random moments, and compares it with a run without
faults.

Ranks die by SIGKILL, segmentation fault, os._exit, exception and a kill with full memory; one of them, rank
0, several, all but one, the same again, or the replacement of a lost rank before it has joined; while data is
loaded, in forward, in backward, between ready and commit, inside optimizer.step(), after the gate, in
evaluation, in checkpoint saving, in the last step, after the loop, and by wall clock from outside. With --kinds all
a rank is also stopped for a while, or slow, or cannot write to any file, the agent is stopped, and where at least three
ranks hold the same, a bit of a parameter flips, which must be found (verify_every=1). The seed draws the schedule.
Parameters, optimizer state, scheduler and all random number generators are compared bit for bit at the end. Exit code 0
only if every fault was survived and the comparison holds.

--layout spreads the model over the ranks: shards, tensor and pipeline parallel. Each part then keeps a living rank,
whatever strikes at once ("all but one" is as many ranks as that allows), so that no fault needs the job to start
over. With fsdp and zero each rank has a part that no other has: only mirrors can bring it back (--mirror-every).

--nodes runs the job on several hosts (network namespaces, so it needs root) with --spares more that wait. A part of the
faults then strikes a whole node: it loses its power, falls silent, or its agent is paused for some seconds or killed.
Afterwards it comes back with a fresh agent, which is the next spare; half of those that fell silent are reachable again
before that. The node of the embedded store is left alone; with --store etcd no node is, and a member of etcd is killed
too, and started again after some seconds, while its node goes on.

--layout and --nodes take several values (ddp,hsdp and 1,3): each combination is a run of its own, one after the other,
and the faults are shared between them; each draws with the next seed. The report is that of all runs together; it is
written after each of them, and a run that fails or hangs is marked in it ("error"), and does not keep the next one from
being done.

A --script of yours is struck by wall clock only, and judged by its files:"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import harness
from harness import etcd, hosts
from harness.clock import Clock
from harness.cluster import Cluster, start
from harness.job import OURS, TORCHRUN, Job, JobFailedError, Plan, Running
from harness.layouts import ALONE, LAYOUTS, Holders, holders, survivable
from harness.node_faults import NodeFaults
from harness.outcomes import Outcome, as_struck, outcome, struck_at
from harness.recoveries import read_recoveries
from harness.report import write_json
from harness.schedule import schedule, steps_needed, with_flips, with_nodes
from harness.steps import read_logs
from harness.weights import folder_differences
from jobs.faults import FLIP, KINDS, NODE_KINDS, OUTSIDE_KINDS, STORE_KINDS, Fault, write_schedule

from checkpointless_elastic.observe.machine import provenance
from checkpointless_elastic.protocol.checks import MIN_REPLICAS
from checkpointless_elastic.worker.damage import ASKED

ALL_KINDS = (*KINDS, *OUTSIDE_KINDS, FLIP)
HUNG = 124
DEFAULT_SCRIPT = Path(__file__).parent / "jobs" / "chaos_job.py"


def run_struck(plan: Plan, faults: Sequence[Fault], seed: int, timeout: float) -> tuple[int, str]:
    """The job with faults; prints each one as it strikes. Returns the exit code, and what it did not do in time."""
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
        try:
            if nodes and nodes.error:
                raise nodes.error
            code, error = job.code(timeout=1), ""
        except JobFailedError as failure:
            code, error = HUNG, str(failure)
        if code:
            print(error or job.tail(), file=sys.stderr)
        return code, error.partition("\n")[0]


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
    if FLIP in options.kinds:
        environment |= {"CHECKPOINTLESS_VERIFY_EVERY": "1", ASKED: "1"}
    environment["CHECKPOINTLESS_NODE_FAULTS"] = "0"  # faults are drawn: no node is to blame
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
    of_workers, flips = options.faults - options.node_faults, flips_of(options)
    kinds = [kind for kind in options.kinds if kind != FLIP]
    workers = schedule(of_workers - flips, options.seed, options.ranks, steps, kinds, own, parts)
    names = NODE_KINDS + (STORE_KINDS if options.store == "etcd" else ())
    others = with_nodes(workers, options.node_faults, options.seed, steps, names)
    return with_flips(others, flips, options.seed, options.ranks, steps)


def flips_of(options: argparse.Namespace) -> int:
    """The share of the faults of workers that are flipped bits."""
    of_workers = options.faults - options.node_faults
    return round(of_workers / len(options.kinds)) if FLIP in options.kinds else 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs and their comparison, as the report."""
    steps = options.steps or steps_needed(options.faults)
    faults, parts = draw(options, steps), parts_of(options)
    calm, struck = plans(options, folder, steps)
    print(
        f"{title(options)}, seed {options.seed}: {len(faults)} faults in {steps} steps; first a run without faults ...",
        flush=True,
    )
    with Job(calm) as job:
        job.finish()
    code, error = run_struck(struck, faults, options.seed, options.timeout or max(600, 10 * options.faults))
    logs, recoveries = (
        read_logs(struck.folder, options.ranks),
        read_recoveries(struck.folder / "recoveries.jsonl"),
    )
    outcomes = [outcome(as_struck(struck.folder, fault), struck.folder, logs, recoveries) for fault in faults]
    found = folder_differences(calm.folder, struck.folder, options.ranks)
    for difference in found[:5]:
        print(difference, file=sys.stderr)
    longest = longest_of(outcomes)
    return {
        "faults": sum(o.struck for o in outcomes),
        "survived": sum(o.struck and not o.missed and (code == 0 or o.seconds is not None) for o in outcomes),
        "equal": not found,
        "longest_interruption_s": longest.seconds if longest else None,
        "longest_interruption_cause": f"{longest.cause}; {title(options)}" if longest else None,
        "layout": options.layout,
        "stranded": sum(not survivable(r.lost_ranks, parts) for r in recoveries) if parts else 0,
        "seed": options.seed,
        "nodes": options.nodes,
        "node_faults": options.node_faults,
        "faults_asked_for": options.faults,
        "exit_code": code,
        "error": error,
        "rungs": dict(Counter(str(o.rung) for o in outcomes if o.struck)),
        "fault_list": [o.entry() | {"layout": options.layout, "nodes": options.nodes} for o in outcomes],
        "lines": [str(o) for o in outcomes],
    }


def attempt(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of one run, whatever comes of it."""
    try:
        return measure(options, folder)
    except Exception as error:
        traceback.print_exc()
        return failed(options, f"{type(error).__name__}: {error}".splitlines()[0])


def failed(options: argparse.Namespace, error: str) -> dict[str, Any]:
    """As `measure`, of a run of which nothing is known."""
    return {
        "faults": 0,
        "survived": 0,
        "equal": False,
        "longest_interruption_s": None,
        "longest_interruption_cause": None,
        "layout": options.layout,
        "stranded": 0,
        "seed": options.seed,
        "nodes": options.nodes,
        "node_faults": options.node_faults,
        "faults_asked_for": options.faults,
        "exit_code": 1,
        "error": error,
        "rungs": {},
        "fault_list": [],
        "lines": [],
    }


def longest_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    return max((o for o in outcomes if o.seconds is not None), key=lambda o: o.seconds or 0.0, default=None)


def title(options: argparse.Namespace) -> str:
    return (
        f"{options.layout} on {options.ranks} ranks, {options.nodes} node{'s' if options.nodes > 1 else ''}"
    )


def together(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs; of one run it is the same, but for "runs"."""
    sums = ("faults", "survived", "stranded", "node_faults", "faults_asked_for")
    measured = [report for report in reports if report["longest_interruption_s"] is not None]
    longest = max(measured, key=lambda report: report["longest_interruption_s"], default=reports[0])
    apart = ("fault_list", "lines")
    return {
        **{name: sum(report[name] for report in reports) for name in sums},
        "equal": all(report["equal"] for report in reports),
        "longest_interruption_s": longest["longest_interruption_s"],
        "longest_interruption_cause": longest["longest_interruption_cause"],
        "layout": ",".join(dict.fromkeys(report["layout"] for report in reports)),
        "nodes": ",".join(dict.fromkeys(str(report["nodes"]) for report in reports)),
        "seed": reports[0]["seed"],
        "exit_code": next((report["exit_code"] for report in reports if report["exit_code"]), 0),
        "error": "; ".join(
            f"{report['layout']}, {report['nodes']} nodes: {report['error']}"
            for report in reports
            if report["error"]
        ),
        "rungs": dict(sum((Counter(report["rungs"]) for report in reports), Counter())),
        "fault_list": [fault for report in reports for fault in report["fault_list"]],
        "runs": [{key: report[key] for key in report if key not in apart} for report in reports],
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
    parser.add_argument(
        "--nodes",
        type=numbers,
        default=[1],
        help="hosts with ranks (default 1: this machine), or several numbers",
    )
    parser.add_argument("--spares", type=int, help="hosts that wait (default 1 with several nodes)")
    parser.add_argument(
        "--node-faults", type=int, help="how many faults of a run strike nodes (default: each fourth)"
    )
    parser.add_argument("--store", choices=("c10d", "etcd"), default="c10d", help="with several nodes")
    parser.add_argument(
        "--layout",
        type=layouts,
        default=["ddp"],
        help=f"of the model: some of {','.join(LAYOUTS)} (default ddp)",
    )
    parser.add_argument(
        "--mirror-every", type=int, default=0, help="steps between mirrors, for fsdp and zero"
    )
    parser.add_argument(
        "--kinds",
        type=kinds,
        default=list(KINDS),
        help=f"some of {','.join(ALL_KINDS)}, or all (default: those that kill)",
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--script", type=Path, default=DEFAULT_SCRIPT, help="another training script")
    parser.add_argument("--steps", type=int, help="BENCH_STEPS (default: what the faults need)")
    parser.add_argument(
        "--timeout",
        type=float,
        help="seconds for a struck run (default 600, or 10 for each fault if that is more)",
    )
    parser.add_argument("--keep", type=Path, help="keep the jobs' folders here")
    options = parser.parse_args(arguments)
    options.runs = runs_of(parser, options)
    return options


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def layouts(text: str) -> list[str]:
    return known(text.split(","), LAYOUTS)


def kinds(text: str) -> list[str]:
    return list(ALL_KINDS) if text == "all" else known(text.split(","), ALL_KINDS)


def known(names: list[str], all_names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in all_names:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(all_names)}")
    return names


def runs_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each combination of layout and nodes, with its share of the faults."""
    pairs = list(product(options.layout, options.nodes))
    if options.faults < len(pairs):
        parser.error(f"{len(pairs)} runs need as many faults at least")
    if options.node_faults and max(options.nodes) == 1:
        parser.error("faults of nodes need --nodes 2 or more, and a spare")
    found = []
    for index, (layout, nodes) in enumerate(pairs):
        run = copy.copy(options)
        run.layout, run.nodes, run.seed = layout, nodes, options.seed + index
        run.faults = options.faults // len(pairs) + (index < options.faults % len(pairs))
        settle(parser, run)
        found.append(run)
    return found


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fills in what depends on the layout and the number of nodes, and ends the program when that makes no sense."""
    several = options.nodes > 1
    options.ranks = options.ranks or (2 * options.nodes if several else 4)
    options.spares = (1 if several else 0) if options.spares is None or not several else options.spares
    every_fourth = options.faults // 4
    options.node_faults = (every_fourth if options.node_faults is None else options.node_faults) * several
    if several:  # a paused agent is a fault of nodes
        options.kinds = [kind for kind in options.kinds if kind != "stopped-agent"]
        if not options.kinds:
            parser.error("with several nodes an agent that stands still is among --node-faults")
    if options.node_faults and not options.spares:
        parser.error("faults of nodes need --nodes 2 or more, and a spare")
    if several and options.ranks % options.nodes:
        parser.error("several nodes take a multiple of their number of --ranks")
    try:
        holders(options.layout, options.ranks)
    except ValueError as error:
        parser.error(str(error))
    if options.layout in ALONE and not options.mirror_every:
        parser.error(
            f"With {options.layout} a lost rank's shard is nowhere else: give --mirror-every K to keep mirrors of it."
        )
    if options.script != DEFAULT_SCRIPT or scarce(options):
        options.kinds = [kind for kind in options.kinds if kind != FLIP]
        if not options.kinds:
            parser.error(
                f"{FLIP} needs a layout in which {MIN_REPLICAS} ranks hold the same, and our own script"
            )


def scarce(options: argparse.Namespace) -> bool:
    """Whether there is state of which too few ranks hold the same to know which bytes are right."""
    return min(map(len, holders(options.layout, options.ranks))) < MIN_REPLICAS


def obstacle(options: argparse.Namespace) -> str:
    """Why this cannot be done on this machine; empty where it can."""
    if all(run.nodes == 1 for run in options.runs):
        return ""
    return hosts.supported() or (etcd.supported() if options.store == "etcd" else "")


def main() -> int:
    options = parse()
    if reason := obstacle(options):
        print(reason, file=sys.stderr)
        return 2
    reports = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for number, run in enumerate(options.runs):
            reports.append(attempt(run, (options.keep or Path(folder)) / f"run-{number}"))
            print("\n".join(["", *reports[-1]["lines"], ""]), flush=True)
            write_json(options.json, report := together(reports))
    print(f"{report['survived']} of {report['faults']} faults survived, rungs {report['rungs']}")
    print(
        f"longest interruption {report['longest_interruption_s']} s: {report['longest_interruption_cause']}"
    )
    print("equal" if report["equal"] else "not equal")
    if report["error"]:
        print(report["error"])
    good = (
        report["equal"]
        and report["survived"] == report["faults"] == options.faults
        and not report["exit_code"]
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
