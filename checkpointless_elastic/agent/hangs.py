"""Looks after this node's workers: which of them are past their limit, and what they are doing.

The pulses are read (`worker.pulse`), which no worker notices, as soon as one of them can be past its limit, at most
every TICK_S and at least every CALM_S. Once a worker is past its limit each one is asked where its main thread is;
those that do not answer in time are said not to. What was found goes to the coordinator, which knows all ranks and
decides who is to blame (`protocol.hangs`); it is said again while that lasts.

Every PACE_S the coordinator is also told how fast each rank is (`protocol.pace`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.config import Config
from checkpointless_elastic.process_stat import STATE, stat_fields
from checkpointless_elastic.protocol.between import Halted, Pace
from checkpointless_elastic.protocol.hangs import Activity, Verdicts, Where
from checkpointless_elastic.protocol.messages import Explain, Explained, Message
from checkpointless_elastic.protocol.station import Station
from checkpointless_elastic.worker.pulse import Monitor, pulse_path

__all__ = ["Hangs"]

logger = logging.getLogger(__name__)

TICK_S = 0.05
CALM_S = 0.25
ANSWER_S = 0.15
AGAIN_S = 0.5
PACE_S = 5.0
"""Between two reports of how fast each rank is."""
STARVED = 4
"""Times that a worker is given longer while the machine does not let it run."""


class Hangs:
    """``ask(rank, message)``: send it to a worker. ``tell(halted)``: what was found. ``pids``: of workers, by rank."""

    def __init__(
        self,
        loop: EventLoop,
        settings: Config,
        pids: Mapping[int, int],
        ask: Callable[[int, Message], object],
        tell: Callable[[Halted | Pace], None],
    ) -> None:
        self._loop, self._pids, self._ask, self._tell = loop, pids, ask, tell
        self._factor = settings.hang_factor
        self._slack = settings.hang_slack.total_seconds()
        self._unknown = settings.hang_timeout.total_seconds()
        self._run_dir = ""
        self._station: Station | None = None
        self._monitors: dict[int, Monitor] = {}
        self._answers: dict[int, Explained] = {}
        self._asked: dict[int, int] | None = None  # by rank, the process that was asked
        self._waited: dict[int, dict[int, int]] = {}
        self._looked = 0.0
        self._next = self._next_pace = 0.0
        self._excused = 0.0  # what began before this counts from here: the agent itself did not run
        self._verdicts = Verdicts()
        self._wheres: dict[int, Where] = {}  # as they were last reported

    def begin(self, run_dir: str, station: Station) -> None:
        """Look after the workers of this seat in this run of the script."""
        started, self._run_dir, self._station = bool(self._run_dir), run_dir, station
        self._monitors, self._asked = {}, None
        if self._factor and not started:
            self._looked = time.monotonic()
            self._tick()

    def _judged(self) -> dict[int, int]:
        """The ranks that are looked at now, and their processes."""
        ranks = self._station.running if self._station is not None else frozenset()
        return {rank: self._pids[rank] for rank in sorted(ranks)}

    def answered(self, rank: int, answer: Explained) -> None:
        """A worker has said where it is."""
        self._answers[rank] = answer

    def ended(self, rank: int, reason: str) -> None:
        """A worker is ended for being late."""
        logger.error("Rank %d is ended, it %s.", rank, reason)
        self._verdicts.ended(self._step, self._wheres.get(rank))

    @property
    def _step(self) -> int:
        return self._station.step if self._station is not None else 0

    def _limit(self, expected: int, activity: int, at: str | None = None) -> float:
        """Seconds that what a rank does may take; ``at``: its place in the script, where that is known."""
        if not expected or activity == Activity.OUTSIDE:
            return self._unknown
        slack = self._slack * 2.0 ** self._verdicts.doublings(self._step, at)
        return min(self._unknown, self._factor * expected / 1e9 + slack)

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._looked > AGAIN_S:
            self._excused = now
        self._looked = now
        if now >= self._next_pace:
            self._next_pace = now + PACE_S
            self._tell_pace()
        judged = self._judged()
        left = min((self._left(rank, now) for rank in judged), default=CALM_S)
        calm = min(CALM_S, self._slack)  # what begins now is not late before
        self._loop.call_later(max(TICK_S, min(left, calm)), self._tick)
        if left < 0 and self._asked is None and now >= self._next:
            self._inquire(judged)

    def _tell_pace(self) -> None:
        paces = {rank: self._monitor(rank).pace() for rank in self._judged()}
        if paces:
            self._tell(Pace(paces))

    def _monitor(self, rank: int) -> Monitor:
        if rank not in self._monitors:
            self._monitors[rank] = Monitor(pulse_path(self._run_dir, rank))
        return self._monitors[rank]

    def _left(self, rank: int, now: float) -> float:
        """Seconds until this rank is late, or may be what others wait for."""
        activity, since, expected = self._monitor(rank).glance()
        if activity == Activity.SETUP:  # never late itself, but others may wait for it
            return self._unknown - self._lasts(since, now) if since else math.inf
        return self._limit(expected, activity) - self._lasts(since, now)

    def _lasts(self, since: int, now: float) -> float:
        return now - max(since / 1e9, self._excused)

    def _inquire(self, judged: dict[int, int]) -> None:
        self._answers, self._asked = {}, judged
        self._waited = {pid: _waits_for_a_core(pid) for pid in judged.values()}
        for rank, pid in judged.items():
            if not _is_stopped(pid):  # it would not read
                self._ask(rank, Explain())
        self._loop.call_later(ANSWER_S, self._report)

    def _report(self) -> None:
        asked, self._asked = self._asked, None
        now = time.monotonic()
        self._next = now + AGAIN_S
        if asked is None or asked != self._judged():
            return
        wheres = self._wheres = {rank: self._where(rank, pid, now) for rank, pid in asked.items()}
        if self._station is not None and any(where.late or where.overlong for where in wheres.values()):
            self._tell(Halted(self._station.generation, self._station.step, wheres))

    def _where(self, rank: int, pid: int, now: float) -> Where:
        reading = self._monitor(rank).read()
        answer = self._answers.get(rank)
        at = answer.at if answer is not None else ""
        limit, lasts = self._limit(reading.expected, reading.activity, at), self._lasts(reading.since, now)
        if answer is not None and answer.compiles:
            limit = self._unknown
        elif self._is_starved(pid):
            limit = min(self._unknown, STARVED * limit)
        return Where(
            reading.activity,
            reading.activity is not Activity.SETUP and lasts > limit,
            reading.stretch,
            reading.issued,
            lasts,
            _is_stopped(pid),
            answer is not None,
            answer is not None and answer.waits,
            at,
            limit,
            lasts > self._unknown,
        )

    def _is_starved(self, pid: int) -> bool:
        """Since it was asked, a thread of this worker mostly waited for a core: the machine is overloaded."""
        before = self._waited.get(pid, {})
        return any(
            waited - before.get(thread, waited) > ANSWER_S / 2 * 1e9
            for thread, waited in _waits_for_a_core(pid).items()
        )


def _waits_for_a_core(pid: int) -> dict[int, int]:
    """By thread, nanoseconds for which it was runnable and did not run (proc_pid_schedstat(5)); empty if not known."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # the thread has ended, or the kernel does not count
            found[int(path.parent.name)] = int(path.read_text().split()[1])
    return found


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP or its like; a process that a debugger has stopped is another matter."""
    try:
        return stat_fields(pid)[STATE] == "T"
    except OSError:
        return False
