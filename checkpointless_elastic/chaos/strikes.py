"""What can be done to a process of a job from outside, and why other things cannot."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSEGV, SIGSTOP

from checkpointless_elastic.chaos.processes import Process, seat
from checkpointless_elastic.worker.damage import request_path

__all__ = ["KINDS", "REFUSED", "Kind"]

DEATH_S = 10.0
"""How long a killed process may take to be gone."""
STOPPED_S, RUNNING_S = 0.09, 0.01
"""A slow rank stands still and runs in turns."""
LOOK_S = 0.01


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        meaning: half a sentence for the help.
        strike: does it to a process, for up to so many seconds if it is something that passes, and takes it back.
            Returns when it is over, or when the process has ended; whether it came to pass.
        agent: it is done to an agent and not to a worker.
        spare: it takes a node away for good, so that there must be a spare for each.
        silent: nothing fails by itself: the job must find it, by comparing its replicas, and replace the rank.
    """

    meaning: str
    strike: Callable[[Process, float], bool]
    agent: bool = False
    spare: bool = False
    silent: bool = False


def _kill(process: Process, seconds: float) -> bool:
    process.send(SIGKILL)
    process.ended(DEATH_S)
    return True


def _segfault(process: Process, seconds: float) -> bool:
    with _limited(process, resource.RLIMIT_CORE):
        process.send(SIGSEGV)
        process.ended(DEATH_S)
    return True


def _exception(process: Process, seconds: float) -> bool:
    process.send(SIGINT)
    process.ended(seconds)
    return True


def _memory(process: Process, seconds: float) -> bool:
    with _limited(process, resource.RLIMIT_AS):
        if not process.ended(seconds):
            _kill(process, seconds)
    return True


def _disk(process: Process, seconds: float) -> bool:
    with _limited(process, resource.RLIMIT_FSIZE):
        process.ended(seconds)
    return True


def _stop(process: Process, seconds: float) -> bool:
    process.send(SIGSTOP)
    try:
        process.ended(seconds)
    finally:
        process.send(SIGCONT)
    return True


def _slow(process: Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not process.ended(RUNNING_S):
        _stop(process, STOPPED_S)
    return True


def _corrupt(process: Process, seconds: float) -> bool:
    """The worker flips the bit itself, at its next step, see `worker.damage`."""
    end, place = time.monotonic() + seconds, None
    while place is None and time.monotonic() < end and not process.ended(LOOK_S):
        place = seat(process.pid)
    if place is None:
        return False
    request = Path(request_path(*place))
    try:
        request.touch()
    except FileNotFoundError:  # the job is over
        return False
    while request.exists() and time.monotonic() < end and not process.ended(LOOK_S):
        pass
    if taken := not request.exists():
        process.ended(max(0.0, end - time.monotonic()))
    request.unlink(missing_ok=True)
    return taken


@contextmanager
def _limited(process: Process, which: int) -> Iterator[None]:
    """Its soft limit of a resource is 0 meanwhile."""
    try:
        soft, hard = resource.prlimit(process.pid, which)
        resource.prlimit(process.pid, which, (0, hard))
    except ProcessLookupError:
        yield
        return
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            if not process.ended(0):
                resource.prlimit(process.pid, which, (soft, hard))


KINDS = {
    "kill": Kind("SIGKILL", _kill),
    "segfault": Kind("SIGSEGV", _segfault),
    "exception": Kind("SIGINT, which raises KeyboardInterrupt in the script", _exception),
    "out-of-memory": Kind(
        "no allocation that needs more address space succeeds (RLIMIT_AS); a worker that lives on for "
        "--stop-seconds is killed then, as the kernel's killer would do it",
        _memory,
    ),
    "disk-full": Kind(
        "no write to a file succeeds (RLIMIT_FSIZE), in shared memory neither, for --stop-seconds", _disk
    ),
    "stop": Kind("SIGSTOP, until it is replaced or --stop-seconds are over", _stop),
    "slow": Kind("stands still for nine tenths of the time, for --stop-seconds", _slow),
    "corrupted-memory": Kind(
        "a bit of a parameter flips at the start of a step; only where the job compares its replicas at each step "
        "(verify_every=1) and three ranks or more hold the same; the rank must be found and replaced",
        _corrupt,
        silent=True,
    ),
    "stopped-agent": Kind("SIGSTOP of a torchrun process for --stop-seconds", _stop, agent=True),
    "killed-agent": Kind(
        "SIGKILL of a torchrun process; only where the command starts several, with a spare for each that is killed "
        "(not the one that holds the embedded store)",
        _kill,
        agent=True,
        spare=True,
    ),
}

REFUSED = {
    "cut-link": "packets between processes of one machine are dropped only by a rule of its firewall, which root sets "
    "for the whole machine; scripts/chaos --nodes in the repository cuts links of a job of ours, on network namespaces",
    "lost-store": "the embedded store is in an agent's process, and the job ends with it; an etcd is not this "
    "command's, and others may use it; scripts/chaos --nodes --store etcd in the repository kills members of its own",
    "clock-jump": "the wall clock is one for the whole machine, and a process cannot be given another one from "
    "outside while it runs (time namespaces shift only the other clocks, and only before a process starts)",
}
"""Faults that are known and cannot be had for a command of the user's, each with the reason."""
