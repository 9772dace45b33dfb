"""Does all of it work, and how fast, with NCCL on the GPUs of this machine? One command, one report.

Runs the tests marked `gpu` and measures

    recovery_ddp, recovery_hsdp   a killed rank: seconds by phase, and whether the end equals a run without a fault
    collectives                   what the gate and an all_reduce cost beside a native group
    process_to_process            state read from another process by CUDA IPC, verified, beside a plain copy
    broadcast                     the same amount by NCCL from one rank to another
    abort                         how long after the start of an abort a hanging collective lets thread and device go

Ranks that outnumber the GPUs share them (--sharing). Each part runs in a process of its own with a time limit; one
that fails is named in the report with its error, and the others go on. Writes gpu_check.json and gpu_check.md to --out.
Nothing is installed or downloaded. With --device cpu all parts run on gloo and shared memory instead, which checks
this command where no GPU is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from harness.report import write_json

from checkpointless_elastic.observe.machine import provenance

ROOT = Path(__file__).parents[1]
NAME = "gpu_check"
SLOWER_ON_CPU = 2  # there is no hurry where no GPU is lent, and cores may be few
NO_GPU = (
    "torch finds no NVIDIA GPU here: run this where one is, with a CUDA build of torch, or with --device cpu."
)
Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: its key in the report.
        run: gives what the report says of it; in a process of its own.
        limit: seconds after which it is ended.
    """

    name: str
    run: Callable[[argparse.Namespace], Found]
    limit: float


def tests(options: argparse.Namespace) -> Found:
    """The tests marked `gpu`: counts, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={path}", "tests"]
        subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = {
        f"{case.get('classname')}.{case.get('name')}": (case[0].get("message") or "")[:2000]
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    }
    return {**counts, "seconds": float(suite.get("time", "0")), "failed": failed, "ok": not failed}


def recovery(layout: str, options: argparse.Namespace) -> Found:
    """As recovery_time.py measures it, without the rounds of plain torchrun."""
    import recovery_time
    from harness.job import OURS
    from harness.recoveries import phase_medians

    asked = recovery_time.parse(["--ranks", str(options.ranks), "--layout", layout, *_shorter(options)])
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        bench = recovery_time.Bench(asked, layout, Path(folder))
        bench.reference()
        rounds = [bench.measure(OURS, number) for number in range(asked.repeats)]
    return {
        "ok": all(result.equal for result in rounds) and bool(bench.recoveries),
        "seconds": [result.seconds for result in rounds],
        "equal": all(result.equal for result in rounds),
        "rungs": [found.rung for found in bench.recoveries],
        "phases": phase_medians(bench.recoveries),
        "groups_rebuilt": [found.groups_rebuilt for found in bench.recoveries],
        "bytes_moved": [found.bytes_moved for found in bench.recoveries],
        "transfer_seconds": [found.transfer_seconds for found in bench.recoveries],
    }


def _shorter(options: argparse.Namespace) -> list[str]:
    repeats, steps, warm_up = ("1", "24", "6") if options.quick else ("3", "40", "10")
    return ["--repeats", repeats, "--steps", steps, "--warm-up", warm_up]


def collectives(options: argparse.Namespace) -> Found:
    """As steady_state.py measures them."""
    import steady_state

    os.environ.setdefault("BENCH_PAIRS", "10" if options.quick else "40")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        return steady_state.small_calls(options, Path(folder))


def process_to_process(options: argparse.Namespace) -> Found:
    import gpu_measures

    return gpu_measures.process_to_process(*_amount(options))


def broadcast(options: argparse.Namespace) -> Found:
    import gpu_measures

    mib, repeats = _amount(options)
    return gpu_measures.by_broadcast(gpu_measures.PIECES * mib, repeats)


def _amount(options: argparse.Namespace) -> tuple[int, int]:
    """MiB of a piece, and rounds."""
    return (16, 3) if options.quick else (256 if options.device == "cuda" else 64, 10)


def abort(options: argparse.Namespace) -> Found:
    import gpu_measures

    return gpu_measures.abort_latency(options.ranks, 1 if options.quick else 3)


PARTS = (
    Part("abort", abort, 60),
    Part("process_to_process", process_to_process, 45),
    Part("broadcast", broadcast, 45),
    Part("collectives", collectives, 60),
    Part("recovery_ddp", lambda options: recovery("ddp", options), 90),
    Part("recovery_hsdp", lambda options: recovery("hsdp", options), 90),
    Part("tests", tests, 240),
)


def facts() -> Found:
    """What torch knows of the GPUs, their driver and NCCL; empty without one."""
    if not torch.cuda.is_available():
        return {}
    driver = Path("/proc/driver/nvidia/version")
    lines = driver.read_text().splitlines() if driver.exists() else []
    return {
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "driver": lines[0].partition(":")[2].strip() if lines else "unknown",
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _gpu(number: int) -> Found:
    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def in_own_process(part: Part, options: argparse.Namespace, left: float) -> Found:
    """Runs one part; its result, or why there is none. What it prints goes to this terminal."""
    limit = min(part.limit * (SLOWER_ON_CPU if options.device == "cpu" else 1), left)
    if limit <= 0:
        return {
            "ok": False,
            "error": f"It was not begun: the time of the whole check ({options.limit:g} s) was over.",
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, __file__, *options.given, "--part", part.name, "--json", str(path)]
        environment = {**os.environ, "BENCH_DEVICE": options.device, "BENCH_SHARING": options.sharing}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            return {"ok": False, "error": f"It did not end within {limit:.0f} s."}
        if path.exists():
            found: Found = json.loads(path.read_text())
            return found
        return {"ok": False, "error": f"Its process ended with exit code {code} and left no result."}


def end(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C does, which ends the jobs that it started, then for good."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(options: argparse.Namespace) -> int:
    """The body of the process of one part."""
    (part,) = (part for part in PARTS if part.name == options.part)
    try:
        found = {"ok": True, **part.run(options)}
    except (Exception, SystemExit) as error:  # the report names it, and the other parts go on
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:4000]}
    write_json(options.json, found)
    return 0


def check(options: argparse.Namespace) -> Found:
    """All parts, one after the other."""
    started = time.monotonic()
    found: dict[str, Found] = {}
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        began = time.monotonic()
        print(f"{part.name} ...", flush=True)
        result = in_own_process(part, options, options.limit - (began - started))
        found[part.name] = {**result, "took_s": round(time.monotonic() - began, 1)}
        print(f"{part.name}: {'ok' if result['ok'] else result.get('error', 'not ok')}", flush=True)
    return {
        "device": options.device,
        "backend": "gloo" if options.device == "cpu" else "nccl",
        "sharing": options.sharing,
        "quick": options.quick,
        "ranks": options.ranks,
        "ok": all(result["ok"] for result in found.values()),
        "accelerator": facts() if options.device == "cuda" else {},
        "parts": found,
        "took_s": round(time.monotonic() - started, 1),
        **provenance(),
    }


def readable(report: Found) -> str:
    """The report as Markdown."""
    gpus = report["accelerator"].get("gpus", [])
    lines = [f"# gpu_check on {report['device']} with {report['backend']}", ""]
    lines += [f"* GPU: {gpu['name']}, {gpu['memory_gib']} GiB" for gpu in gpus]
    if gpus:
        facts = report["accelerator"]
        lines += [f"* driver {facts['driver']}; CUDA {facts['cuda']}; NCCL {facts['nccl']}"]
    versions, machine = report["versions"], report["machine"]
    lines += [
        f"* torch {versions['torch']}, Python {versions['python']}, {machine['cores']} cores, {machine['system']}",
        f"* {report['ranks']} ranks; shared GPUs by {report['sharing']}; took {report['took_s']} s"
        f"{' (quick)' if report['quick'] else ''}",
        f"* {'everything went well' if report['ok'] else 'NOT everything went well, see below'}",
    ]
    for name, found in report["parts"].items():
        lines += ["", f"## {name}: {'ok' if found['ok'] else 'not ok'}", ""]
        lines += [f"* {line}" for line in _lines(found)]
    return "\n".join(lines) + "\n"


def _lines(found: Found, above: str = "") -> list[str]:
    """One line for each value, its keys in front."""
    lines: list[str] = []
    for key, value in found.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            lines += _lines(value, f"{name}, ")
        elif key != "ok":
            lines.append(f"{name}: {_value(value)}")
    return lines


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "\n    ".join(str(value).splitlines())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report"
    )
    parser.add_argument("--ranks", type=int, default=4, help="workers (default 4)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds")
    parser.add_argument(
        "--sharing",
        choices=("hostid", "multirank"),
        default="hostid",
        help="how NCCL is told to take several ranks on one GPU: NCCL_HOSTID, or NCCL_MULTI_RANK_GPU_ENABLE=1 "
        "(NCCL 2.30 and later) (default hostid)",
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts, separated by commas")
    parser.add_argument("--limit", type=float, default=460, help="seconds for all parts (default 460)")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {part.name for part in PARTS}
    if unknown:
        parser.error(
            f"--only knows {', '.join(part.name for part in PARTS)}, not {', '.join(sorted(unknown))}"
        )
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    return options


def main() -> int:
    options = parse()
    if options.part:
        return run_part(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    report = check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    name = NAME if options.device == "cuda" else f"{NAME}_{options.device}"
    write_json(options.out / f"{name}.json", report)
    (options.out / f"{name}.md").write_text(readable(report))
    print(f"\n{readable(report)}\nwritten to {options.out}/{name}.json and .md")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
