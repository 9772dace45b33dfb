"""Kills workers of a training job while it runs, and shows that nothing was lost.

Trains the byte-level GPT of scripts/recipes/gpt.py with 4 workers under `torchrun --rdzv-backend
checkpointless`, twice: once with ranks killed by SIGKILL at random moments, once left alone. Prints what each
recovery did, whether all other workers kept their processes, and whether both runs ended with the same
parameters, optimizer state and random number generators, bit for bit. Exit code 0 if so."""

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
from dataclasses import dataclass
from pathlib import Path

from harness.job import OURS, Job, JobFailedError, Plan
from harness.recoveries import read_recoveries, timeline
from harness.steps import last_line, pids, progress, read_logs
from harness.weights import folder_differences

RECIPE = Path(__file__).parents[1] / "scripts" / "recipes" / "gpt.py"


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a rank, so many seconds after all ranks had committed a step."""

    step: int
    rank: int
    delay: float


def kills(count: int, steps: int, ranks: int, seed: int) -> list[Kill]:
    """Random kills, spread over the run so that each is seen by itself."""
    source = random.Random(seed)
    part = (steps - 20) / max(count, 1)
    at = [10 + int(part * (index + source.uniform(0.2, 0.8))) for index in range(count)]
    return [Kill(step, source.randrange(ranks), source.uniform(0, 0.2)) for step in at]


def train(options: argparse.Namespace, folder: Path, faults: Sequence[Kill]) -> None:
    """One job from start to end, with these kills."""
    arguments = ("--steps", str(options.steps), "--seed", str(options.seed), "--out", str(folder))
    plan = Plan(OURS, RECIPE, folder, options.ranks, arguments=arguments, show=True)
    with Job(plan) as job:
        for fault in faults:
            strike(job, fault)
        job.finish(timeout=60 + 2 * options.steps)


def strike(job: Job, fault: Kill) -> None:
    folder, ranks = job.plan.folder, job.plan.ranks
    job.until(lambda: progress(folder, ranks) >= fault.step, timeout=120)
    time.sleep(fault.delay)
    commit = last_line(folder / f"steps-{fault.rank}.log")
    assert commit is not None
    os.kill(commit.pid, signal.SIGKILL)
    print(f"\n>>> SIGKILL to rank {fault.rank}, process {commit.pid}, after step {commit.step}", flush=True)


def strays(folder: Path, ranks: int, faults: Sequence[Kill]) -> list[str]:
    """Ranks that had more, or fewer, processes than their kills explain."""
    expected = Counter(fault.rank for fault in faults)
    found = pids(read_logs(folder, ranks))
    return [
        f"rank {rank} had {len(processes)} processes, {1 + expected[rank]} expected"
        for rank, processes in found.items()
        if len(processes) != 1 + expected[rank]
    ]


def judge(options: argparse.Namespace, struck: Path, calm: Path, faults: Sequence[Kill]) -> bool:
    """Prints what happened and says whether all is as it should be."""
    print("\nRecoveries, in order:\n")
    recoveries = read_recoveries(struck / "recoveries.jsonl")
    for recovery in recoveries:
        print(timeline(recovery) + "\n")
    wrong = strays(struck, options.ranks, faults)
    if len(recoveries) != len(faults):
        wrong.append(f"{len(recoveries)} recoveries were recorded for {len(faults)} kills")
    print("\n".join(wrong) if wrong else "All surviving workers kept their processes.")
    found = folder_differences(calm, struck, options.ranks)
    for difference in found[:5]:
        print(difference)
    print("\nParameters, optimizer state and random number generators, with and without faults:")
    print("not equal" if found else "equal", flush=True)
    return not found and not wrong


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=4, help="how many kills (default 4)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="chooses kills and initial weights (default 0)")
    parser.add_argument("--ranks", type=int, default=4, help="workers (default 4)")
    options = parser.parse_args(arguments)
    if options.steps < 20 + 5 * options.faults:
        parser.error(f"{options.faults} faults need at least {20 + 5 * options.faults} steps")
    return options


def main() -> int:
    options = parse()
    faults = kills(options.faults, options.steps, options.ranks, options.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        struck, calm = Path(folder, "with-faults"), Path(folder, "without-faults")
        try:
            print(f"A run of {options.steps} steps in which {len(faults)} workers are killed:", flush=True)
            train(options, struck, faults)
            print("\nThe same run, left alone:", flush=True)
            train(options, calm, ())
        except JobFailedError as error:
            print(f"{error}\nnot equal", file=sys.stderr)
            return 1
        good = judge(options, struck, calm, faults)
    print(f"({time.monotonic() - start:.0f} s)", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
