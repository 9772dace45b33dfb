"""How long does the control plane take, by number of agents: one commit, and the first part of a recovery?

All agents are on this machine, many in one process, and talk over TCP on loopback; the protocol is the package's own.
Workers are stand-ins that answer at once, and private state is not copied to guardians: what is measured is the
control plane alone. With few processors that is mostly the work of all agents, which a cluster does side by side.

    recovery_ms    from the report of a lost worker to the last agent's acknowledgement (all survivors have said where
                   they stand) at the coordinator; resumed_ms: until all agents are told to compute again
    commit_ms      from the first agent that is ready to the last one that is told that the step is committed
    store_only_*   the same two with one TCPStore in place of connections: each agent writes its key and waits for the
                   coordinator's, what torchrun's rendezvous does, here without its pauses between two looks

messages_per_agent and coordinator_messages are those sent and taken in one step, heartbeats apart; *_recovery: in one
recovery, up to its end. The median of the ordinary agents, and messages_most of the busiest one. coordinator_cpu_ms and
store_only_cpu_ms are the processor time of the coordinator's process, and of the one with the store: what does not get
less when each agent has a machine of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from harness.report import write_json
from plane.process import JOB, Child, Settings, agents_process, raise_limits
from plane.store_only import open_store, store_process

from checkpointless_elastic.agent.directory_tcp import TcpDirectory
from checkpointless_elastic.observe.machine import provenance

PER_PROCESS = 128  # agents in one process, at most, unless --processes says otherwise
START_S = 600.0  # for all agents of a process to be connected
SETTLE_S = 0.2  # for threads that begin to wait in the store


def shares(agents: int, processes: int) -> list[int]:
    """Agents of each process; the first one has the coordinator alone, as a node of its own would."""
    others = agents - 1
    count = processes or max(2, -(-others // PER_PROCESS))
    return [1, *filter(None, (others * (n + 1) // count - others * n // count for n in range(count)))]


@contextmanager
def children(bodies: Sequence[tuple[object, ...]]) -> Iterator[list[Child]]:
    """Processes, in turn: each begins when the one before has said that it is there."""
    with ExitStack() as stack:
        found: list[Child] = []
        for index, body in enumerate(bodies):
            child = Child(*body)  # type: ignore[arg-type]
            stack.callback(child.end)
            found.append(child)
            if index == 0:
                child.answer(START_S)  # the coordinator's comes first
        for child in found[1:]:
            child.answer(START_S)
        yield found


def tell(all_of_them: Sequence[Child], order: str, argument: object = None) -> None:
    for child in all_of_them:
        child.tell(order, argument)


def answers(all_of_them: Sequence[Child]) -> list[tuple[float, float, dict[str, float]]]:
    return [child.answer() for child in all_of_them]


@dataclass
class Cost:
    """Messages of the coordinator and of each other agent; milliseconds of processor time of the coordinator."""

    chair: int
    others: list[int]
    busy_ms: float

    def __add__(self, more: Cost) -> Cost:
        others = [a + b for a, b in zip(self.others, more.others, strict=True)]
        return Cost(self.chair + more.chair, others, self.busy_ms + more.busy_ms)

    def row(self, of: str, repeats: int) -> dict[str, float]:
        return {
            f"messages_per_agent{of}": median(self.others) / repeats,
            f"messages_most{of}": max(self.others) / repeats,
            f"coordinator_messages{of}": self.chair / repeats,
            f"coordinator_cpu_ms{of}": self.busy_ms / repeats,
        }


def costs(all_of_them: Sequence[Child]) -> Cost:
    """Since the last time."""
    tell(all_of_them, "count")
    ((chair,), busy_ms), *others = (child.answer() for child in all_of_them)
    return Cost(chair, [count for counts, _ in others for count in counts], busy_ms)


# ---- with the package's protocol


def commit(all_of_them: Sequence[Child]) -> float:
    """Milliseconds."""
    tell(all_of_them, "ready")
    times = answers(all_of_them)
    return 1e3 * (max(last for _, last, _ in times) - min(first for first, _, _ in times))


def recover(all_of_them: Sequence[Child], victim: int) -> tuple[float, float]:
    """Milliseconds until all survivors have said where they stand, and until all agents compute again."""
    tell(all_of_them, "resumed")
    answers(all_of_them)
    all_of_them[-1].tell("lose", victim)
    times = answers(all_of_them)
    lost, frozen = times[-1][0], times[0][2]["frozen"]
    return 1e3 * (frozen - lost), 1e3 * (max(last for _, last, _ in times) - lost)


def measure(agents: int, options: argparse.Namespace) -> dict[str, float]:
    directory = TcpDirectory.open("127.0.0.1", 0, JOB, 30.0, timeout=30.0, is_host=True)
    settings = Settings(agents, options.ranks, int(directory.endpoint.rpartition(":")[2]), options.heartbeat)
    bodies = [
        (agents_process, n, count, settings) for n, count in enumerate(shares(agents, options.processes))
    ]
    try:
        with children(bodies) as found:
            tell(found, "seated")
            answers(found)
            commit(found)  # a job is protected from its first step on
            costs(found)
            commits = [commit(found) for _ in range(options.repeats)]
            step, recovery = costs(found), Cost(0, [0] * (agents - 1), 0.0)
            recoveries = []
            for victim in range(options.repeats):
                recoveries.append(recover(found, victim))
                recovery += costs(found)
                commit(found)
                costs(found)
    finally:
        directory.close()
    return {
        "recovery_ms": median(frozen for frozen, _ in recoveries),
        "resumed_ms": median(resumed for _, resumed in recoveries),
        "commit_ms": median(commits),
        **step.row("", options.repeats),
        **recovery.row("_recovery", options.repeats),
    }


# ---- with a store alone


def measure_store(agents: int, options: argparse.Namespace) -> dict[str, float]:
    store = open_store(host=True)
    begins, bodies = 0, []
    for count in shares(agents, options.processes):
        bodies.append((store_process, begins, count, agents, store.port))
        begins += count
    with children(bodies) as found:
        commits, recoveries = [], []
        busy = [time.process_time()]  # of this process, in which the store is
        for number in range(options.repeats + 1):  # the first one is left out
            tell(found, "commit", number)
            times = answers(found)
            commits.append(1e3 * (max(last for _, last, _ in times) - min(first for first, _, _ in times)))
        busy.append(time.process_time())
        for number in range(options.repeats + 1):
            tell(found, "recover", number)
            answers(found)
            time.sleep(SETTLE_S)
            lost = time.monotonic()
            store.set(f"lost/{number}", "1")
            recoveries.append(1e3 * (float(str(answers(found)[0][2])) - lost))
        busy.append(time.process_time())
    commit_ms, recovery_ms = (1e3 * (b - a) / (options.repeats + 1) for a, b in pairwise(busy))
    return {
        "store_only_recovery_ms": median(recoveries[1:]),
        "store_only_commit_ms": median(commits[1:]),
        "store_only_cpu_ms": commit_ms,
        "store_only_cpu_ms_recovery": recovery_ms,
    }


# ---- the command


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 3:
        raise argparse.ArgumentTypeError(
            "at least 3 agents: a coordinator, one that loses a worker, and one more"
        )
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--agents", type=numbers, default=[64, 256, 1024], help="A,B,... (default 64,256,1024)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="workers of each agent (default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="commits and recoveries (default 15)")
    parser.add_argument(
        "--processes", type=int, default=0, help=f"default: one for each {PER_PROCESS} agents"
    )
    parser.add_argument("--heartbeat", type=float, default=5.0, help="seconds (default 5)")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    raise_limits()
    found: dict[str, dict[str, float]] = {}
    for agents in options.agents:
        row = {**measure(agents, options), **measure_store(agents, options)}
        found[str(agents)] = row
        print(
            f"{agents:5} agents: recovery {row['recovery_ms']:.1f} ms, commit {row['commit_ms']:.1f} ms; by a store "
            f"alone {row['store_only_recovery_ms']:.1f} and {row['store_only_commit_ms']:.1f} ms; messages per step "
            f"{row['messages_per_agent']:.1f} (coordinator {row['coordinator_messages']:.0f})",
            flush=True,
        )
    settings = {name: getattr(options, name) for name in ("ranks", "repeats", "processes", "heartbeat")}
    write_json(options.json, {"agents": found, **settings, **provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
