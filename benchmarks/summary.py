"""Turns the reports in benchmarks/results/ into the README's results, between its two markers.

python benchmarks/summary.py            prints them
python benchmarks/summary.py --write    puts them into README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results -->", "<!-- end of results -->"


def recovery_lines(report: dict[str, Any]) -> Iterator[str]:
    phases = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in report["phases"].items())
    yield (
        f"* SIGKILL of one of {report['ranks']} ranks, 5 M parameters, DDP on gloo: interrupted for "
        f"{report['ours_median_s']:.2f} s; plain torchrun with a local checkpoint {report['torchrun_median_s']:.2f} s, "
        f"{report['ratio']:.0f} times as long (medians of {len(report['rounds']) // 2}). "
        f"Final state {'equal' if report['equal'] else 'NOT equal'} to a run without a fault."
    )
    yield f"  Milliseconds by phase: {phases}. Steps done again: {report['lost_steps']:g}."
    yield f"  Memory beyond the plain job: {report['memory_per_worker_mib']} MiB per worker."


def steady_lines(report: dict[str, Any]) -> Iterator[str]:
    low, high = report["overhead_interval_percent"]
    collective = report["collective_us"]
    yield (
        f"* Steps of {report['step_ms']['plain']:.0f} ms take {report['overhead_percent']:.2f} % longer when "
        f"protected (95 % interval {low:.2f} to {high:.2f}, {report['pairs']} pairs). A gate takes "
        f"{report['gate_us']:.0f} µs, a replayable call {report['call_us']:.0f} µs more than "
        f"its step, a small all-reduce {collective['elastic'] - collective['native']:.0f} µs more "
        f"than the native {collective['native']:.0f} µs."
    )


def chaos_lines(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"* Chaos, seed {report['seed']}: {report['survived']} of {report['faults']} faults survived, final state "
        f"{'equal' if report['equal'] else 'NOT equal'}, longest interruption {report['longest_interruption_s']:.2f} s."
    )


KINDS = {
    "ours_median_s": recovery_lines,
    "overhead_percent": steady_lines,
    "longest_interruption_s": chaos_lines,
}


def summary(folder: Path) -> str:
    """All reports as a list, and the machines and versions that they name."""
    lines: list[str] = []
    origins: dict[str, None] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        writer = next((writer for key, writer in KINDS.items() if key in report), None)
        if writer is None:  # of layouts and of transfers: the README's own table has them
            continue
        lines += writer(report)
        machine, versions = report["machine"], report["versions"]
        origins[
            f"Measured on {machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, "
            f"{machine['gpus']} GPUs, {machine['system']}; Python {versions['python']}, torch {versions['torch']}."
        ] = None
    return "\n".join([*lines, "", *origins]) if lines else "Nothing measured yet."


def put(readme: str, text: str) -> str:
    """The README with everything between the markers exchanged."""
    head, rest = readme.split(START)
    return f"{head}{START}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="change README.md")
    options = parser.parse_args()
    text = summary(RESULTS)
    if options.write:
        readme = ROOT / "README.md"
        readme.write_text(put(readme.read_text(), text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
