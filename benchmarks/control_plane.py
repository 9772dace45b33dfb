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
recovery, up to its end. The median of the ordinary agents, and messages_most of the busiest one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from harness.machine import provenance
from harness.report import write_json
from plane.process import JOB, Child, Settings, agents_process, raise_limits
from plane.store_only import open_store, store_process

from checkpointless_elastic.agent.directory_tcp import TcpDirectory

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


def counts(all_of_them: Sequence[Child]) -> tuple[int, list[int]]:
    """Messages of the coordinator, and of each other agent, since the last time."""
    tell(all_of_them, "count")
    (chair, *more), *others = (child.answer() for child in all_of_them)
    return chair, [*more, *(count for counts in others for count in counts)]


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
            counts(found)
            commits = [commit(found) for _ in range(options.repeats)]
            step = counts(found)
            recoveries = []
            recovery: tuple[int, list[int]] = (0, [0] * (agents - 1))
            for victim in range(options.repeats):
                recoveries.append(recover(found, victim))
                chair, others = counts(found)
                recovery = recovery[0] + chair, [a + b for a, b in zip(recovery[1], others, strict=True)]
                commit(found)
                counts(found)
    finally:
        directory.close()
    return {
        "recovery_ms": median(frozen for frozen, _ in recoveries),
        "resumed_ms": median(resumed for _, resumed in recoveries),
        "commit_ms": median(commits),
        **messages("", step, options.repeats),
        **messages("_recovery", recovery, options.repeats),
    }


def messages(of: str, counted: tuple[int, list[int]], repeats: int) -> dict[str, float]:
    chair, others = counted
    return {
        f"messages_per_agent{of}": median(others) / repeats,
        f"messages_most{of}": max(others) / repeats,
        f"coordinator_messages{of}": chair / repeats,
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
        for number in range(options.repeats + 1):  # the first one is left out
            tell(found, "commit", number)
            times = answers(found)
            commits.append(1e3 * (max(last for _, last, _ in times) - min(first for first, _, _ in times)))
        for number in range(options.repeats + 1):
            tell(found, "recover", number)
            answers(found)
            time.sleep(SETTLE_S)
            lost = time.monotonic()
            store.set(f"lost/{number}", "1")
            recoveries.append(1e3 * (float(str(answers(found)[0][2])) - lost))
    return {
        "store_only_recovery_ms": median(recoveries[1:]),
        "store_only_commit_ms": median(commits[1:]),
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
