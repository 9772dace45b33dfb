"""Reads steps-<rank>.log files and tells how long a fault interrupted a job and how many steps it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Commit:
    """One line of a log: this rank, as this process, had committed this step at this time."""

    time_ns: int
    step: int
    pid: int


@dataclass(frozen=True)
class Interruption:
    """What a fault cost.

    Attributes:
        seconds: from the fault until all ranks had committed one and the same step.
        step: that step.
        lost_steps: how many steps were computed again, the one in flight included.
    """

    seconds: float
    step: int
    lost_steps: int


Logs = Mapping[int, Sequence[Commit]]


def read_log(path: Path) -> list[Commit]:
    """The complete lines of one log; a line that is being written is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [Commit(*map(int, line.split())) for line in complete.splitlines()]


def read_logs(folder: Path, ranks: int) -> dict[int, list[Commit]]:
    return {rank: read_log(folder / f"steps-{rank}.log") for rank in range(ranks)}


def last_line(path: Path) -> Commit | None:
    """The newest complete line, reading only the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 256))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return Commit(*map(int, lines[-1].split())) if lines and len(lines[-1].split()) == 3 else None


def newest_process(folder: Path, rank: int) -> int | None:
    """The rank's process: as it says itself at its start, else as its last line says; None before both."""
    announced = folder / f"pid-{rank}"
    if announced.exists():
        return int(announced.read_text())
    commit = last_line(folder / f"steps-{rank}.log")
    return commit.pid if commit else None


def progress(folder: Path, ranks: int) -> int:
    """The newest step that every rank has committed, or -1."""
    last = [last_line(folder / f"steps-{rank}.log") for rank in range(ranks)]
    return min(commit.step if commit else -1 for commit in last)


def interruption(logs: Logs, fault_ns: int) -> Interruption | None:
    """Judges one fault; None when the ranks never committed a common step after it.

    A lost rank counts as back when it commits a step like any other, so the end is the first step that all
    ranks committed after the fault, at the moment when the last of them did."""
    after = {rank: _first_times(commits, fault_ns) for rank, commits in logs.items()}
    common = set.intersection(*(set(times) for times in after.values()))
    if not common:
        return None
    step = min(common, key=lambda candidate: max(times[candidate] for times in after.values()))
    end = max(times[step] for times in after.values())
    before = max((c.step for commits in logs.values() for c in commits if c.time_ns <= fault_ns), default=-1)
    return Interruption((end - fault_ns) / 1e9, step, max(0, before + 2 - step))


def pids(logs: Logs) -> dict[int, list[int]]:
    """The processes that each rank has had, in order."""
    return {rank: list(dict.fromkeys(commit.pid for commit in commits)) for rank, commits in logs.items()}


def step_seconds(commits: Sequence[Commit]) -> list[float]:
    """Time between neighbouring steps of one process."""
    pairs = zip(commits, commits[1:], strict=False)
    return [(b.time_ns - a.time_ns) / 1e9 for a, b in pairs if b.step == a.step + 1 and a.pid == b.pid]


def _first_times(commits: Sequence[Commit], after_ns: int) -> dict[int, int]:
    times: dict[int, int] = {}
    for commit in commits:
        if commit.time_ns > after_ns:
            times.setdefault(commit.step, commit.time_ns)
    return times
