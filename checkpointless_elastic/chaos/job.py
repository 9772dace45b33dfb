"""A command of the user's that starts a job: what runs below it, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpointless_elastic.chaos.processes import Agent, agents, glance_at, members, written_at
from checkpointless_elastic.errors import CheckpointlessError
from checkpointless_elastic.observe.records import Recovery, read_recoveries
from checkpointless_elastic.worker.damage import ASKED

__all__ = ["ChaosError", "Job", "StuckError", "flips_obstacle", "is_up", "moved", "steps", "training"]

PAUSE_S = 0.02
GRACE_S = 10.0
"""How long a command that is told to end may take, and then what it started, before it is killed."""


class ChaosError(CheckpointlessError):
    """Raised when there is nothing to measure; the sentence says what to change."""


class StuckError(CheckpointlessError):
    """Raised when the job does not go on or end in time."""


class Job:
    """The running command; as a context manager it leaves no process behind.

    Attributes:
        folder: holds out/ (CHAOS_OUT), log.txt and recoveries.jsonl.
        left: processes and run directories that were still there GRACE_S after the command had ended.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.out.mkdir(parents=True)
        self.left: list[str] = []
        self._run_dirs: set[str] = set()
        self._mark = f"CHAOS_OUT={self.out}"
        ours = {"CHECKPOINTLESS_EVENTS": str(self._events), ASKED: "1", "CHAOS_OUT": str(self.out)}
        words = [word.replace("{out}", str(self.out)) for word in command]
        with self.log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    words,
                    env={**os.environ, **ours},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ChaosError(f"The command cannot be run: {error}.") from error

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        # A second Ctrl-C must not end the cleaning up that the first one caused.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._end()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        if self.running():
            for pid in members(self._mark):
                _signal(pid, signal.SIGCONT)
            os.killpg(self._process.pid, signal.SIGTERM)  # a shell that starts torchrun would not pass it on
            self._wait(lambda: not members(self._mark), GRACE_S)
        self._wait(lambda: not self._leftovers(), GRACE_S)
        self.left = self._leftovers()
        self._wait(self._are_killed, GRACE_S)
        self._process.wait()

    def _are_killed(self) -> bool:
        found = members(self._mark)
        for pid in found:
            _signal(pid, signal.SIGKILL)
        return not found

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def _events(self) -> Path:
        return self.folder / "recoveries.jsonl"

    @property
    def code(self) -> int | None:
        """Exit code of the command; None while it runs."""
        return self._process.poll()

    def running(self) -> bool:
        return self.code is None

    def agents(self) -> list[Agent]:
        found = agents(self._mark)
        self._run_dirs.update(*(agent.run_dirs for agent in found))
        return found

    def recoveries(self) -> list[Recovery]:
        return read_recoveries(self._events)

    def until(self, ready: Callable[[], bool], seconds: float, what: str) -> bool:
        """Waits until it is so; False if the command ended before. Raises StuckError when the time is over."""
        self._wait(lambda: not self.running() or ready(), seconds, what)
        return self.running()

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _leftovers(self) -> list[str]:
        folders = sorted(path for path in self._run_dirs if os.path.exists(path))
        return [f"process {pid}" for pid in members(self._mark)] + folders

    def _wait(self, ready: Callable[[], bool], seconds: float, what: str = "") -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                if what:
                    raise StuckError(f"For {seconds:g} s {what}.")
                return
            time.sleep(PAUSE_S)


def is_up(found: Sequence[Agent]) -> bool:
    """Whether there is a worker for each rank."""
    return any(agent.workers for agent in found) and all(
        agent.workers.keys() >= agent.slots().keys() for agent in found
    )


def steps(found: Sequence[Agent]) -> int:
    """Steps that all ranks have committed, by what they last wrote; -1 before the first, or after a restart."""
    slots = [glance_at(path) for agent in found for path in agent.slots().values()]
    return min((slot.step if slot else -1 for slot in slots), default=-1)


def training(agent: Agent, rank: int) -> bool:
    """Whether the rank is in a loop of a Run, or in a step: not before it, and not at the end of the script."""
    state = glance_at(agent.slots()[rank]) if rank in agent.slots() else None
    return state is not None and state.in_loop


def moved(found: Sequence[Agent], since: float) -> bool:
    """Whether each rank has begun or computed a step since this time (seconds since the epoch)."""
    return all(written_at(path) > since for agent in found for path in agent.slots().values())


def flips_obstacle(found: Sequence[Agent], known: str) -> str:
    """Why a flipped bit of a rank's memory would not be put right, as the ranks say it; `known` while one is silent."""
    said = [agent.flips(rank) for agent in found for rank in agent.slots()]
    return known if None in said or not said else next(filter(None, said), "")


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
