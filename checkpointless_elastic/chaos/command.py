"""Runs a command twice, undisturbed and with faults, and compares the files that its job writes, bit for bit.

    checkpointless chaos --faults 10 --kinds all -- \\
        torchrun --rdzv-backend checkpointless --nproc-per-node 4 train.py --output {out}

The command runs in the present directory. Each run has a directory of its own for what it writes: the script finds
it in the variable CHAOS_OUT, or the command says {out} where it is to be named. (For a script that writes into its
working directory: -- sh -c 'cd {out} && torchrun ... /path/to/train.py'.) Of the files there those that --compare
names must be the same after both runs. A job that is compared must be deterministic: seeds fixed, no clock times.

Faults strike from outside, one after the other, at moments of the wall clock that the seed draws over the whole job,
each when the job has recovered from the one before. They begin with the first step of a Run and end with its loops; a
script without one is struck from its start, and torchrun needs --max-restarts then.

Exit code 0 only if all faults came to pass and were survived, the files are equal, and no process was left behind; 1
if not; 2 if nothing could be measured. For each fault the report says the kind, the moment (seconds after the first
step), who was struck, the rung of the answer ("-": nobody was lost), and the seconds until all ranks had gone on; what
passes (stop, slow, ...) is part of them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from checkpointless_elastic.chaos.compare import folders, matching
from checkpointless_elastic.chaos.job import ChaosError, Job
from checkpointless_elastic.chaos.plan import draw
from checkpointless_elastic.chaos.report import document, good, table, verdict
from checkpointless_elastic.chaos.strikes import KINDS, REFUSED
from checkpointless_elastic.chaos.trial import Limits, Oracle, Trial, calm

__all__ = ["main"]

TENSORS = ["**/*.pt", "**/*.safetensors"]


def main(arguments: Sequence[str]) -> int:
    """The exit code. When it raises KeyboardInterrupt or SystemExit, for a signal, nothing runs any more."""
    options = _parse(arguments)
    # A shell has SIGINT ignored in what it starts with &, and workers would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    code = 0
    try:
        code = _measure(options, folder)
    except ChaosError as error:
        print(error, file=sys.stderr)
        code = 2
    finally:
        if not options.keep and code != 1:
            shutil.rmtree(folder)
    if code == 1:
        print(f"What both runs wrote and said is in {folder}.")
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    meanings = "\n".join(_row(name, kind.meaning) for name, kind in KINDS.items())
    refused = "\n".join(_row(name, reason) for name, reason in REFUSED.items())
    parser = argparse.ArgumentParser(
        prog="checkpointless chaos",
        usage="checkpointless chaos [options] -- COMMAND ...",
        description=__doc__,
        epilog=f"kinds, of a worker if nothing else is said:\n{meanings}\n\nnot done here:\n{refused}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--kinds", type=_kinds, default="all", help="a,b,... or all (default all)")
    parser.add_argument("--seed", type=int, default=0, help="draws kinds, ranks and moments (default 0)")
    parser.add_argument(
        "--compare",
        metavar="GLOB",
        action="append",
        help=f"files below CHAOS_OUT, may be repeated (default {' '.join(TENSORS)}); tensors in .pt and .safetensors "
        f"are compared bit for bit, other files byte for byte",
    )
    parser.add_argument(
        "--oracle", type=Path, metavar="DIR", help="oracle/ of an earlier --keep: run only with faults"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="a new directory for both runs (default: removed)"
    )
    parser.add_argument(
        "--stop-seconds", type=float, default=5, help="how long what passes lasts (default 5)"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one recovery (default 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    before, command = _split(arguments)
    options = parser.parse_args(before)
    if not command:
        parser.error("give the command that starts the job, after --")
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep}: there is something in it already")
    if re.search(r"--rdzv[-_]conf[= ]\S*\bevents=", " ".join(command)):
        parser.error("leave events= out of --rdzv-conf: the recoveries are read from a file of each run")
    options.command, options.compare = command, options.compare or TENSORS
    return options


def _row(name: str, text: str) -> str:
    return textwrap.fill(f"  {name:<18}{text}", 110, subsequent_indent=" " * 20)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own options and the command."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _kinds(text: str) -> list[str]:
    names = list(KINDS) if text == "all" else text.split(",")
    for name in names:
        if name in REFUSED:
            raise argparse.ArgumentTypeError(f"{name} cannot be done here: {REFUSED[name]}")
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"there is no kind {name!r}; there are {', '.join(KINDS)}")
    return names


def _measure(options: argparse.Namespace, folder: Path) -> int:
    calm_folder = options.oracle.absolute() if options.oracle else folder / "oracle"
    oracle = _oracle(options, calm_folder)
    kinds = _possible(options.kinds, oracle)
    faults = draw(options.faults, options.seed, kinds, oracle.ranks, oracle.spares)
    with Job(options.command, folder / "faults") as job:
        trial = Trial(job, oracle, Limits(options.stop_seconds, options.timeout), _say)
        trial.run(faults)
    report = document(trial, job, folders(calm_folder / "out", job.out, options.compare), options.seed)
    print(f"\n{table(report)}\n\n{verdict(report)}")
    if report["stuck"] or report["exit_code"]:
        print(f"The end of its output:\n{job.tail()}", file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if good(report) else 1


def _oracle(options: argparse.Namespace, folder: Path) -> Oracle:
    """What is known of the run without faults, which is done now unless there is one."""
    if options.oracle:
        oracle = Oracle.load(folder)
    else:
        _say("first a run without faults ...")
        oracle = calm(options.command, folder)
    if not matching(folder / "out", options.compare):
        raise ChaosError(
            f"The job wrote no file {' or '.join(options.compare)} into its directory: have it write to {{out}} or "
            f"$CHAOS_OUT, or name the files to compare with --compare."
        )
    needy = [name for name in options.kinds if KINDS[name].spare]
    if needy == options.kinds and oracle.spares < options.faults:
        raise ChaosError(
            f"{options.faults} times {needy[0]} needs a command that starts the agents of several nodes, among them as "
            f"many spares (--nnodes 2:3); this one has {oracle.spares}."
        )
    what = f"{oracle.steps} steps" if oracle.steps else "no step of a Run"
    spares = f", {oracle.spares} spares" if oracle.spares else ""
    _say(
        f"{oracle.ranks} ranks{spares}, {what} in {oracle.seconds:.1f} s; now with {options.faults} faults ..."
    )
    return oracle


def _possible(kinds: list[str], oracle: Oracle) -> list[str]:
    """Without those that this job cannot have, where all are asked for. Raises ChaosError where they were named."""
    silent = [name for name in kinds if KINDS[name].silent]
    if not silent or not oracle.flips:
        return kinds
    reason = f"{silent[0]} is not done: {oracle.flips}."
    if kinds != list(KINDS):
        raise ChaosError(f"{reason} Or leave it out of --kinds.")
    _say(reason)
    return [name for name in kinds if name not in silent]


def _say(line: str) -> None:
    print(line, flush=True)
