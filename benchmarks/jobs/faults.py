"""Faults that strike a training job from inside, each once, as a schedule file says.

The schedule is faults.json in BENCH_DIR. Before a rank dies it leaves a marker, faults/<number>-<rank>, made
with O_EXCL, so that neither the replay of a step nor the replacement of the rank strikes again. The marker's
content is the time, in nanoseconds."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpointless_elastic.worker.damage import request_path

KINDS = ("SIGKILL", "SIGSEGV", "exit", "exception", "out-of-memory")
OUTSIDE_KINDS = ("stop", "slow", "disk-full", "stopped-agent")  # of checkpointless_elastic.chaos.strikes
FLIP = "corrupted-memory"  # a bit of a parameter of this rank; it does not die, but is found and replaced
CLOCK = "clock"  # struck from outside
SLOW = "slow"  # no fault: the ranks wait for the delay instead
READY = "ready"  # between ready and commit
NODE_KINDS = ("power off", "cut", "paused agent", "killed agent")  # done to a node, always from outside
STORE_KINDS = ("lost member",)  # done to a member of etcd, whose node goes on
HOLD = "hold"  # file with the number of a step; the job waits where it loads data for that or a later one


class InjectedError(RuntimeError):
    """The exception that stands for a bug or a failing device in one rank."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the schedule.
        kind: how the ranks die, one of KINDS, or FLIP or SLOW; or what is done to a process or a node from outside, one
            of OUTSIDE_KINDS, NODE_KINDS or STORE_KINDS.
        moment: where in the script; CLOCK: at a time instead.
        step: it strikes at this step or, where the moment does not occur in it, the next time that it does.
        ranks: who dies; empty for a node's or a store's fault: who is struck is chosen when it strikes.
        target: why these ranks, in a word.
        delay: seconds after the step was reached (CLOCK) or after the gate was entered (READY), or of waiting (SLOW).
        after: number of the fault whose replacement it strikes, or -1.
        lasts: seconds until it passes, one of OUTSIDE_KINDS.
    """

    number: int
    kind: str
    moment: str
    step: int
    ranks: tuple[int, ...]
    target: str = "one rank"
    delay: float = 0.0
    after: int = -1
    lasts: float = 0.0


def write_schedule(folder: Path, faults: Sequence[Fault]) -> None:
    (folder / "faults").mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))


def read_schedule(folder: Path) -> list[Fault]:
    path = folder / "faults.json"
    if not path.exists():
        return []
    return [Fault(**{**raw, "ranks": tuple(raw["ranks"])}) for raw in json.loads(path.read_text())]


def marker(folder: Path, fault: int, rank: int | str) -> Path:
    return folder / "faults" / f"{fault}-{rank}"


def hold(folder: Path, step: int | None) -> None:
    """Holds the job up before this step, and no longer before another one; None: not at all."""
    partial = folder / f"{HOLD}.partial"
    if step is None:
        (folder / HOLD).unlink(missing_ok=True)
    else:
        partial.write_text(str(step))
        partial.replace(folder / HOLD)


def held(folder: Path, step: int) -> bool:
    try:
        return step >= int((folder / HOLD).read_text())
    except FileNotFoundError:
        return False


def claim(path: Path) -> bool:
    """Makes the marker; False when it was there. The content follows in the same breath."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return False
    os.write(descriptor, str(time.time_ns()).encode())
    os.close(descriptor)
    return True


class Faults:
    """The faults that this rank has to suffer; at() is called at each named moment of the script."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self._folder = folder
        self._rank = rank
        schedule = [fault for fault in read_schedule(folder) if fault.moment != CLOCK]
        self._mine = [fault for fault in schedule if rank in fault.ranks]
        self._late = [f for f in schedule if f.moment == READY and rank == waited_for(f, ranks)]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def at(self, moment: str, step: int) -> None:
        """Dies here if a fault is due; otherwise returns at once, or when the job is no longer held up."""
        while moment == "data" and held(self._folder, step):
            time.sleep(0.01)
        for fault in self._mine:
            if fault.moment == moment and step >= fault.step and self._is_possible(fault):
                path = marker(self._folder, fault.number, self._rank)
                if claim(path):
                    strike(fault, self._rank, path)

    def before_gate(self, step: int) -> None:
        """As at(READY), for the ranks that die while they wait, and holds up the rank that they wait for."""
        for fault in self._late:
            if step >= fault.step and claim(marker(self._folder, fault.number, "late")):
                time.sleep(fault.delay + 0.01)
        self.at(READY, step)

    def _is_possible(self, fault: Fault) -> bool:
        return fault.after < 0 or marker(self._folder, fault.after, self._rank).exists()


def waited_for(fault: Fault, ranks: int) -> int:
    """The rank whose ready comes late when others die between ready and commit; -1: nobody is left to wait
    for."""
    return next((rank for rank in range(ranks) if rank not in fault.ranks), -1)


def strike(fault: Fault, rank: int, path: Path) -> None:
    """Ends this process, or raises, as the fault's kind says. ``path``: its marker, which says when."""
    if fault.kind == SLOW:
        time.sleep(fault.delay)
    elif fault.kind == FLIP:
        Path(request_path(os.environ["CHECKPOINTLESS_RUN_DIR"], rank)).touch()
    elif fault.moment == READY:
        threading.Timer(fault.delay, die_late, (fault.kind, path)).start()
    elif fault.kind == "exception":
        raise InjectedError(f"fault {fault.number} of the schedule")
    else:
        die(fault.kind)


def die_late(kind: str, path: Path) -> None:
    """The step may have been committed meanwhile, on a busy machine."""
    path.write_text(str(time.time_ns()))
    die(kind)


def die(kind: str) -> None:
    if kind == "exit":
        os._exit(17)
    if kind == "out-of-memory":
        hoard = bytearray(1 << 26)  # the kernel's killer comes with the memory still full
        hoard[::4096] = b"x" * len(hoard[::4096])
    os.kill(os.getpid(), signal.SIGSEGV if kind == "SIGSEGV" else signal.SIGKILL)
