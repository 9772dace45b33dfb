"""Cuts a node off a training job of several nodes, and shows that nothing was lost.

Each node is a host of its own in network namespaces of this machine: torchrun runs on each, and one more waits as a
spare. While the job trains, a node falls silent, as when its power or its network is gone; its ranks go on on the
spare, under the same numbers. Then the same with the node whose agent coordinates the job, and with a node that is
reachable again while the job still runs. Prints what happens, and whether the job ended with the same parameters,
optimizer state and random number generators as a run without a fault, bit for bit. Exit code 0 if so. Needs root.

--store etcd keeps the job's store in three etcd members, one on each of the first three hosts; a lost node then takes
a member with it. The embedded store (c10d) lives on the first node, which is not struck then."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import etcd, hosts
from harness.cluster import Cluster, Node, start
from harness.hosts import HostsError
from harness.job import OURS, TORCHRUN, JobFailedError, Plan
from harness.recoveries import Recovery, read_recoveries, timeline
from harness.steps import interruption, newest_process, pids, progress, read_logs
from harness.weights import folder_differences

JOB = Path(__file__).parent / "jobs" / "ddp.py"
FAULTS = ("node", "coordinator", "partition")
STORE_OF = {"node": "c10d", "coordinator": "etcd", "partition": "c10d"}
FENCED = 15.0  # seconds that an agent has, once it is reachable again, to stop its workers
HEAL_AFTER = 2  # steps that the others do before a node that was cut off is reachable again


class Story:
    """One job, one fault."""

    def __init__(self, options: argparse.Namespace, fault: str, store: str, folder: Path) -> None:
        self.options, self.fault, self.store, self.folder = options, fault, store, folder
        self.begun = time.monotonic()
        self.wrong: list[str] = []
        self.left_behind: list[int] = []  # processes of the ranks on the struck node

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.begun:6.1f} s  {line}", flush=True)

    def tell(self, calm: Path) -> bool:
        """Runs the job and says whether it ended as the calm one."""
        plan = plan_of(self.options, OURS, self.folder, self.store)
        print(f"\n{self.title()}:\n", flush=True)
        with start(plan) as job:
            assert isinstance(job, Cluster)
            self.before(job)
            struck_ns, before = self.strike(job)
            self.after(job, struck_ns, before)
            job.finish(timeout=self.options.timeout)
        self.say("the job has ended")
        self.judge(calm, struck_ns)
        return not self.wrong

    def title(self) -> str:
        what = {
            "node": "A node is cut off",
            "coordinator": "The node whose agent coordinates the job loses its power",
            "partition": "A node is cut off, and is reachable again while the job goes on without it",
        }
        store = "the embedded store" if self.store == "c10d" else "three etcd members"
        return f"{what[self.fault]}; {store}"

    def before(self, job: Cluster) -> None:
        self.say(f"{len(job.nodes)} hosts are up, torchrun starts on each")
        self.come_to(job, self.options.strike_at)
        coordinator = job.coordinator()
        self.say(f"all ranks have committed step {progress(self.folder, self.options.ranks)}")
        for node in job.nodes:
            self.say(f"  {node}: {words(job.ranks_of(node)) or 'a spare, waits'}{mark(node, coordinator)}")

    def come_to(self, job: Cluster, step: int) -> None:
        job.until(lambda: progress(self.folder, self.options.ranks) >= step, timeout=180)

    def strike(self, job: Cluster) -> tuple[int, dict[int, Node]]:
        """When the fault struck, in nanoseconds, and where each rank was before."""
        node, before = self.target(job), job.placement()
        processes = (newest_process(self.folder, rank) for rank in job.ranks_of(node))
        self.left_behind = [pid for pid in processes if pid is not None]
        struck_ns = time.time_ns()
        if self.fault == "coordinator":
            job.power_off(node)
            self.say(f">>> {node} is switched off")
        else:
            job.cut(node)
            self.say(f">>> {node} is cut off: its packets are dropped, its processes live on")
        return struck_ns, before

    def target(self, job: Cluster) -> Node:
        coordinator = job.coordinator()
        if self.fault == "coordinator":
            if coordinator is None:
                raise JobFailedError("No agent has said in its log that it coordinates the job.")
            return coordinator
        with_ranks = [node for node in job.nodes if job.ranks_of(node) and node is not coordinator]
        return next(node for node in reversed(with_ranks) if not job.holds_store(node))

    def after(self, job: Cluster, struck_ns: int, before: dict[int, Node]) -> None:
        """Until all ranks have committed a step again; then where they are."""
        ranks = self.options.ranks
        job.until(lambda: interruption(read_logs(self.folder, ranks), struck_ns) is not None, timeout=180)
        cost = interruption(read_logs(self.folder, ranks), struck_ns)
        assert cost is not None
        self.say(f"all ranks have committed step {cost.step}, {cost.seconds:.2f} s after the fault")
        now = job.placement()
        for rank in sorted(before):
            if before[rank] is not now.get(rank):
                self.say(f"  rank {rank} has moved from {before[rank]} to {now.get(rank, 'nowhere')}")
        stayed = [rank for rank in before if before[rank] is now.get(rank)]
        self.say(f"  {words(stayed)} stayed where they were")
        if coordinator := job.coordinator():
            self.say(f"  {coordinator} coordinates the job")
        if self.fault == "partition":
            self.bring_back(job, cost.step)

    def bring_back(self, job: Cluster, step: int) -> None:
        (node,) = (node for node in job.nodes if node.struck)
        self.come_to(job, step + HEAL_AFTER)
        node.host.heal()
        self.say(f">>> {node} is reachable again; what still runs there must change nothing")
        end = time.monotonic() + FENCED
        while job.running() and time.monotonic() < end:
            if not any(node.host.has(pid) for pid in self.left_behind):
                self.say(f"the old workers on {node} have ended")
                return
            time.sleep(0.02)
        if job.running():
            self.wrong.append(f"The old workers on {node} were still there {FENCED:g} s after that.")

    def judge(self, calm: Path, struck_ns: int) -> None:
        ranks = self.options.ranks
        recoveries = read_recoveries(self.folder / "recoveries.jsonl")
        print()
        for recovery in recoveries:
            print(timeline(recovery) + "\n" + detected(recovery, struck_ns) + "\n")
        if len(recoveries) != 1:
            self.wrong.append(f"{len(recoveries)} recoveries were recorded for one fault.")
        self.wrong += strays(self.folder, ranks, recoveries)
        self.wrong += folder_differences(calm, self.folder, ranks)[:5]
        print("\n".join(self.wrong) or "All other ranks kept their processes.")
        print("Parameters, optimizer state and random number generators, with and without the fault:")
        print("not equal" if self.wrong else "equal", flush=True)


def words(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""


def mark(node: Node, coordinator: Node | None) -> str:
    return ", coordinates the job" if node is coordinator else ""


def detected(recovery: Recovery, struck_ns: int) -> str:
    """How long it took until the loss was seen; processes of one machine have one clock."""
    return f"    the loss was seen {recovery.time - struck_ns / 1e9:.2f} s after the fault"


def strays(folder: Path, ranks: int, recoveries: Sequence[Recovery]) -> list[str]:
    """Ranks with more or fewer processes than the recoveries explain."""
    lost = [rank for recovery in recoveries for rank in recovery.lost_ranks]
    found = pids(read_logs(folder, ranks))
    return [
        f"Rank {rank} had {len(found[rank])} processes, {1 + lost.count(rank)} expected."
        for rank in range(ranks)
        if len(found[rank]) != 1 + lost.count(rank)
    ]


def plan_of(options: argparse.Namespace, backend: str, folder: Path, store: str = "c10d") -> Plan:
    """The job on all hosts, or, by plain torchrun, the same ranks on this machine."""
    several = backend == OURS
    return Plan(
        backend,
        JOB,
        folder,
        options.ranks,
        options.steps,
        environment={"BENCH_WIDTH": str(options.width), "BENCH_DEVICE_MS": str(options.step_ms)},
        nodes=options.nodes if several else 1,
        spares=options.spares if several else 0,
        store=store,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/cluster_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3, help="hosts with ranks (default 3)")
    parser.add_argument("--spares", type=int, default=1, help="hosts that wait (default 1)")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="workers of a host (default 2)")
    parser.add_argument("--fault", choices=(*FAULTS, "all"), default="all", help="which story (default all)")
    parser.add_argument("--store", choices=("c10d", "etcd"), help="default: etcd for coordinator, else c10d")
    parser.add_argument("--steps", type=int, default=120, help="training steps (default 120)")
    parser.add_argument("--strike-at", type=int, default=20, help="step of the fault (default 20)")
    parser.add_argument("--width", type=int, default=256, help="of the model's layers (default 256)")
    parser.add_argument("--step-ms", type=int, default=50, help="a step takes so long at least (default 50)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a job's end (default 300)")
    parser.add_argument("--keep", type=Path, help="keep the jobs' folders here")
    options = parser.parse_args(arguments)
    options.ranks = options.nodes * options.ranks_per_node
    if options.nodes < 2 or options.spares < 1:
        parser.error("the ranks of a lost node need other nodes to learn from and a spare to go to")
    if "etcd" in [store for _, store in stories(options)] and options.nodes + options.spares < etcd.MEMBERS:
        parser.error(f"etcd needs {etcd.MEMBERS} hosts")
    return options


def stories(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Faults and the stores that they are shown with."""
    faults = FAULTS if options.fault == "all" else (options.fault,)
    return [(fault, options.store or STORE_OF[fault]) for fault in faults]


def obstacle(options: argparse.Namespace) -> str:
    """Why this cannot be shown on this machine; empty where it can."""
    needs: list[Callable[[], str]] = [hosts.supported]
    if any(store == "etcd" for _, store in stories(options)):
        needs.append(etcd.supported)
    return next((reason for need in needs if (reason := need())), "")


def main() -> int:
    options = parse()
    if reason := obstacle(options):
        print(reason, file=sys.stderr)
        return 2
    good = True
    with tempfile.TemporaryDirectory(prefix="cluster-demo-") as place:
        folder = options.keep or Path(place)
        calm = folder / "without-fault"
        print(f"First {options.ranks} ranks without a fault, by plain torchrun on one host ...", flush=True)
        try:
            with start(plan_of(options, TORCHRUN, calm)) as job:
                job.finish(timeout=options.timeout)
            for fault, store in stories(options):
                good &= Story(options, fault, store, folder / f"{fault}-{store}").tell(calm)
        except (JobFailedError, HostsError) as error:
            print(f"{error}\nnot equal", file=sys.stderr)
            return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
