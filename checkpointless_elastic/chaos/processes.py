"""Finds the processes of a running job from outside, in /proc, and signals them.

All processes of a job have a variable of its own in the environment that they were started with. Among them a fork
server is known by its command line; its parent is an agent (torchrun), its children are workers. A worker's rank is
that of the slot it has open; one that is a program of its own (--no-python) has it in its environment.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpointless_elastic.agent.forkserver import run_dir_of
from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.process_stat import PARENT, stat_fields
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.damage import obstacle_path
from checkpointless_elastic.worker.private import PrivateState, read_state

__all__ = ["Agent", "Process", "agents", "glance_at", "holds_store", "members", "seat", "written_at"]

_LISTEN = "0A"  # in /proc/net/tcp


class Process:
    """One process, for good: its number may be used again, a pidfd never means another one."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is none."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def send(self, number: signal.Signals) -> None:
        """Nothing happens to one that has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def ended(self, seconds: float) -> bool:
        """Waits up to so many seconds for its end; True as soon as it has ended."""
        return bool(select.select([self._fd], (), (), seconds)[0])


@dataclass
class Agent:
    """One agent of the job.

    Attributes:
        run_dirs: where its slots are.
        workers: process of each rank that is up.
    """

    pid: int
    run_dirs: set[str] = field(default_factory=set)
    workers: dict[int, int] = field(default_factory=dict)

    def slots(self) -> dict[int, str]:
        """Path of the slot of each rank of this node, whether its worker is up or not."""
        paths = (path for run_dir in self.run_dirs for path in Path(run_dir).glob("slot-*"))
        numbers = ((path.name.partition("-")[2], str(path)) for path in paths)
        return {int(rank): path for rank, path in numbers if rank.isdecimal()}

    def flips(self, rank: int) -> str | None:
        """What a rank of this node has said of flipped bits, see `worker.damage`; None if nothing yet."""
        for run_dir in self.run_dirs:
            with suppress(FileNotFoundError):
                return Path(obstacle_path(run_dir, rank)).read_text()
        return None


def members(mark: str) -> list[int]:
    """All living processes whose first environment has this "NAME=value"."""
    return [pid for pid in _all() if mark.encode() in _strings(pid, "environ")]


def agents(mark: str) -> list[Agent]:
    """The agents of the job, in the order of their process numbers, with the workers that are up now."""
    parents = {pid: _parent(pid) for pid in members(mark)}
    named = {pid: run_dir_of([os.fsdecode(word) for word in _strings(pid, "cmdline")]) for pid in parents}
    # A worker that was forked just now has its server's command line.
    servers = {pid: run_dir for pid, run_dir in named.items() if run_dir and not named.get(parents[pid])}
    found: dict[int, Agent] = {}
    for server, run_dir in sorted(servers.items()):
        agent = found.setdefault(parents[server], Agent(parents[server]))
        agent.run_dirs.add(run_dir)
        for pid in (pid for pid, parent in parents.items() if parent == server):
            rank = _rank(pid, run_dir)
            if rank is not None:
                agent.workers[rank] = pid
    return [found[pid] for pid in sorted(found)]


def seat(pid: int) -> tuple[str, int] | None:
    """The run directory and the rank of a worker, by the slot that it has open; None if it has none."""
    for link in _links(pid):
        run_dir, name = os.path.split(link)
        if name.startswith("slot-") and name[5:].isdecimal():
            return run_dir, int(name[5:])
    return None


def holds_store(pid: int) -> bool:
    """Whether this agent is the one whose process has the embedded store: it listens at the port of the endpoint."""
    words = [os.fsdecode(word).replace("_", "-") for word in _strings(pid, "cmdline")]
    given = " ".join(words).replace("--rdzv-endpoint=", "--rdzv-endpoint ").partition("--rdzv-endpoint ")[2]
    port = given.partition(" ")[0].rpartition(":")[2]
    return port.isdecimal() and not _listening(pid, int(port)).isdisjoint(_links(pid))


def _listening(pid: int, port: int) -> set[str]:
    """Sockets, as descriptors lead to them, that listen at this port in the network of the process."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in _lines(pid, f"net/{name}")[1:]]
    return {
        f"socket:[{row[9]}]"
        for row in rows
        if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port
    }


def glance_at(path: str) -> PrivateState | None:
    """Where the rank of this slot is; None before its first step, or when the slot is being exchanged."""
    try:
        with Slot.open(path) as slot:
            return read_state(slot)
    except (FileNotFoundError, StateMismatchError):
        return None


def written_at(path: str) -> float:
    """When the rank was last ready, or began a step, in seconds since the epoch; 0.0 if the slot is gone."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _rank(pid: int, run_dir: str) -> int | None:
    place = seat(pid)
    if place is not None and place[0] == run_dir:
        return place[1]
    own = (text[5:] for text in _strings(pid, "environ") if text.startswith(b"RANK="))
    return next((int(rank) for rank in own if rank.isdigit()), None)


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _strings(pid: int, file: str) -> list[bytes]:
    """The zero-terminated strings of a file in /proc/PID; none if the process is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().split(b"\0")
    except OSError:
        return []


def _lines(pid: int, file: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(stat_fields(pid)[PARENT])
    except (OSError, IndexError):
        return 0


def _links(pid: int) -> list[str]:
    """What its open descriptors lead to."""
    folder, found = f"/proc/{pid}/fd", []
    try:
        for name in os.listdir(folder):
            found.append(os.readlink(f"{folder}/{name}"))
    except OSError:  # it has ended, or closed a descriptor just now
        return found
    return found
