"""Simulates jobs of many agents under seeded faults, checks the invariants after every event, and counts messages.

simulate.py --agents 3-12 --seeds 1000     small jobs, where most of the interleavings are
simulate.py --agents 1000 --seeds 200      large ones
simulate.py --agents 3-12 --seed 17        one seed again; --trace prints every event
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.pool
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from simulator.costs import Costs, measure
from simulator.schedule import Result, Sizes, play

SIZES = (16, 64, 256, 1024, 10000)
MOST_SHOWN = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", default="3-12", help="number of agents, or a range A-B (default: 3-12)")
    parser.add_argument("--seeds", type=int, default=200, help="how many schedules (default: 200)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--workers", type=int, default=0, help="of each agent (default: 1 or 2, drawn)")
    parser.add_argument("--steps", type=int, default=0, help="of each job (default: drawn)")
    parser.add_argument("--trace", action="store_true", help="print every event; with --seed")
    parser.add_argument(
        "--no-costs", action="store_true", help="do not count messages and bytes by number of agents"
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def sizes(options: argparse.Namespace) -> Sizes:
    """What was asked for. Raises SystemExit with a sentence if it is no range."""
    least, _, most = options.agents.partition("-")
    try:
        return Sizes(int(least), int(most or least), options.workers, options.steps)
    except ValueError:
        raise SystemExit(
            f"--agents takes a number or a range such as 3-12, not {options.agents!r}."
        ) from None


def replay(options: argparse.Namespace, seed: int) -> str:
    """The command that runs a seed again."""
    more = "".join(
        f" --{name} {getattr(options, name)}" for name in ("workers", "steps") if getattr(options, name)
    )
    return f"scripts/simulate --agents {options.agents}{more} --seed {seed} --trace"


def schedules(options: argparse.Namespace, pool: multiprocessing.pool.Pool) -> Iterator[Result]:
    """Run all seeds, with a progress line."""
    seeds = range(options.first, options.first + options.seeds)
    begun, events, failed = time.monotonic(), 0, 0
    calls = [(seed, sizes(options)) for seed in seeds]
    for done, result in enumerate(pool.imap_unordered(_play, calls), 1):
        events, failed = events + result.events, failed + bool(result.violation)
        if result.violation:
            print(f"\nseed {result.seed}: {result.violation[:600]}\n  {replay(options, result.seed)}")
        seconds = time.monotonic() - begun
        line = f"{done}/{options.seeds} schedules, {events} events, {failed} violations, {seconds:.0f} s"
        if sys.stdout.isatty():
            print(f"\r{line}", end="", flush=True)
        elif done % 50 == 0:
            print(line, flush=True)
        yield result
    print(f"\r{line}" if calls else "")


def _play(call: tuple[int, Sizes]) -> Result:
    return play(*call)


def report(costs: list[Costs]) -> str:
    """A table: what an ordinary agent and the coordinator send and take, heartbeats apart."""
    head = "agents  links  | per step: agent (most)     coordinator | lost worker: agent (most)  coordinator"
    lines = [head + " | lost node: agent (most)    coordinator", "  messages / bytes, sent and taken"]
    for row in costs:
        cells = [f"{row['agents']:6} {row['links']:6} "]
        for cost in (row["step"], row["worker_recovery"], row["node_recovery"]):
            agent = f"{cost['messages_median']:.0f}/{cost['bytes_median']:.0f}"
            most = f"({cost['messages_most']:.0f}/{cost['bytes_most']:.0f})"
            chair = f"{cost['coordinator_messages']:.0f}/{cost['coordinator_bytes']:.0f}"
            cells.append(f" {agent:>9} {most:>15} {chair:>14} ")
        lines.append("|".join(cells))
    return "\n".join(lines)


def document(results: list[Result], costs: list[Costs], options: argparse.Namespace) -> dict[str, object]:
    """What goes into the file."""
    last = costs[-1] if costs else None
    return {
        "agents": options.agents,
        "schedules": len(results),
        "events": sum(result.events for result in results),
        "faults": sum(result.faults for result in results),
        "restarts": sum(result.restarts for result in results),
        "resizes": sum(result.resizes for result in results),
        "drains": sum(result.drains for result in results),
        "violations": [
            {"seed": r.seed, "violation": r.violation, "replay": replay(options, r.seed)}
            for r in results
            if r.violation
        ],
        "messages_per_agent": last["step"]["messages_median"] if last else None,
        "bytes_per_agent": last["step"]["bytes_median"] if last else None,
        "coordinator_messages": last["step"]["coordinator_messages"] if last else None,
        "costs": costs,
    }


def main() -> int:
    options = arguments()
    if options.seed is not None:
        result = play(options.seed, sizes(options), print if options.trace else None)
        print(result.violation or f"seed {options.seed}: all invariants hold ({result.events} events)")
        return 1 if result.violation else 0
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        counted = [] if options.no_costs else [size for size in SIZES if size <= max(16, sizes(options).most)]
        costing = pool.map_async(measure, counted, chunksize=1) if counted else None
        results = list(schedules(options, pool))
        costs = costing.get() if costing is not None else []
    if costs:
        print(report(costs))
    if options.json is not None:
        options.json.write_text(json.dumps(document(results, costs, options), indent=1) + "\n")
    return 1 if any(result.violation for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
