"""Follows the recoveries of a job and writes one record for each."""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec

from checkpointless_elastic.agent.bounded import BoundedCaller
from checkpointless_elastic.observe.timeline import Recovery, append, tell
from checkpointless_elastic.protocol.acts import Restarting
from checkpointless_elastic.protocol.between import Between, Gathered, RankExplained, RankGone, RankStarted
from checkpointless_elastic.protocol.events import Action, Chosen, End, Opened, Reached, Resized, Stop
from checkpointless_elastic.protocol.messages import Stage
from checkpointless_elastic.worker.wire import RebuiltReport, RestoredReport

logger = logging.getLogger(__name__)

WRITE_LIMIT_S = 5.0
"""For which the end of an agent waits for records that are not yet written."""


def describe(status: int) -> str:
    """An exit status as the end of a sentence that starts with a rank."""
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class Recoveries:
    """At most one recovery goes on at a time; a fault during it joins it.

    ``events``: file of the JSON lines; empty: in the log directory that ``log_dir()`` names once it is known. They are
    written on a thread, since a file server may not answer.
    """

    def __init__(self, events: str, log_dir: Callable[[], str], pids: dict[int, int]) -> None:
        self._events = events
        self._files = BoundedCaller("checkpointless-records")
        self._log_dir = log_dir
        self._pids = pids
        self._current: Recovery | None = None
        self._seen: float | None = None
        self._noted: dict[int, str] = {}
        self._stuck = 0.0
        self._chosen: Chosen | None = None
        self._ends: dict[int, str] = {}  # ranks that the coordinator has ended, and why

    def perform(self, action: Action, now: float) -> None:
        """The coordinator has come to a point."""
        if isinstance(action, Opened):
            self.opened(action.generation, action.lost, action.cause, now)
        elif isinstance(action, Chosen):
            self.chosen(action)
        elif isinstance(action, Reached):
            self.reached(action.point, action.details, now)
        elif isinstance(action, End):
            self._stuck = max(self._stuck, action.stuck)
        elif isinstance(action, Restarting):
            self.restarting(action.rung, action.reason, action.generation, action.step, now)
        elif isinstance(action, Resized):
            self.resized(action, now)
        elif isinstance(action, Stop):
            self.close()

    def heard(self, message: Between, pending: Callable[[int], bool], now: float) -> None:
        """An agent has said something. ``pending(rank)``: is it a replacement that has not joined?"""
        if isinstance(message, RankGone):
            self.noticed(message.rank, message.cause, now)
        elif isinstance(message, RankStarted):
            self._pids[message.rank] = message.pid
            if pending(message.rank):
                self.mark("forked", now)
        elif isinstance(message, RankExplained):
            self.explain(message.rank, message.cause)
        elif isinstance(message, Gathered) and message.stage is Stage.RESTORED:
            for payload in filter(None, message.reports.values()):
                self.restored(payload)

    def noticed(self, rank: int, cause: str, seen: float) -> None:
        """A loss was seen; the decision follows."""
        self._seen = seen
        cause = self._ends.pop(rank, cause)
        self._noted[rank] = cause
        if self._current is not None:
            self._current.causes[rank] = cause

    def opened(self, generation: int, lost: frozenset[int], cause: str, now: float) -> None:
        """A generation was opened."""
        if self._current is None:
            seen = self._seen if self._seen is not None else now
            self._current = Recovery(generation, 1, cause, set(lost), seen, time.time() - (now - seen))
            self._current.causes.update(self._noted)
        self._current.generation = generation
        self._current.lost |= lost
        self._current.mark("opened", now)

    def chosen(self, choice: Chosen) -> None:
        """The coordinator has chosen a rung; it says so again when survivors have answered."""
        if choice == self._chosen:
            return
        self._chosen = choice
        where = f"generation {choice.generation}, step {choice.step}"
        logger.warning("[%s] %s: rung %d, %s.", where, choice.what, choice.rung, choice.reason)
        self._ends.update(dict.fromkeys(choice.ends, f"was ended: {choice.what}"))
        if self._current is not None:
            self._current.rung, self._current.reason = choice.rung, choice.reason

    def explain(self, rank: int, cause: str) -> None:
        """The exit status of a lost worker has come."""
        if self._current is None or rank not in self._current.lost:
            return
        if self._current.causes.get(rank, "was lost") != "was lost":
            return
        self._current.causes[rank] = cause
        if self._current.cause == "was lost":
            self._current.cause = cause

    def mark(self, point: str, now: float) -> None:
        """A point was reached; ``committed`` ends the recovery."""
        if self._current is None:
            return
        self._current.mark(point, now)
        if point == "committed":
            self.close()

    def reached(self, point: str, details: dict[str, Any], now: float) -> None:
        """The coordinator has reached a point."""
        if self._current is None:
            return
        if point == "frozen":
            self._current.step = details["step"]
            self._current.decision = details["decision"]
        if point == "resumed":
            reports = [
                msgspec.msgpack.decode(p, type=RebuiltReport) for p in details["reports"].values() if p
            ]
            self._current.groups_rebuilt = max((report.rebuilt for report in reports), default=0)
            self._current.groups_kept = max((report.kept for report in reports), default=0)
            self._current.groups_lazy = max((report.lazy for report in reports), default=0)
        self.mark(point, now)

    def restored(self, payload: bytes) -> None:
        """A replacement has its state."""
        if self._current is None:
            return
        report = msgspec.msgpack.decode(payload, type=RestoredReport)
        self._current.bytes_moved += report.bytes
        self._current.transfer_s = max(self._current.transfer_s, report.seconds)
        self._current.copying_s = max(self._current.copying_s, report.copying)

    def restarting(self, rung: int, reason: str, generation: int, step: int, now: float) -> None:
        """The script is run again from its top; ``step`` would have been the next."""
        if self._current is None:
            seen = self._seen if self._seen is not None else now
            cause = next(iter(self._noted.values()), reason)
            self._current = Recovery(
                generation, rung, cause, set(self._noted), seen, time.time() - (now - seen)
            )
            self._current.causes.update(self._noted)
        self._current.generation, self._current.rung, self._current.reason = generation, rung, reason
        self._current.step, self._current.marks = step, {"opened": now, "restarted": now}
        self._ends = {}

    def resized(self, action: Resized, now: float) -> None:
        """The script is run again by another number of ranks."""
        logger.warning(
            "[generation %d, step %d] %s: from %d to %d ranks, which run the script again and keep its state.",
            action.generation,
            action.step,
            action.reason,
            action.before,
            action.after,
        )
        if self._current is None:
            self._current = Recovery(action.generation, 3, action.reason, set(), now, time.time())
        current = self._current
        current.generation, current.rung, current.reason = action.generation, 3, action.reason
        current.step, current.resize = action.step, (current.resize or (action.before,))[:1] + (action.after,)
        current.mark("kept", now)
        self._ends = {}

    def close(self) -> None:
        """The recovery has ended, or will not: write its record."""
        recovery, self._current, self._seen, self._noted = self._current, None, None, {}
        if recovery is None:
            return
        recovery.stuck_s, self._stuck = self._stuck, 0.0
        directory = self._log_dir()
        path = self._events or (f"{directory}/recoveries.jsonl" if directory else "")
        record = recovery.record(self._pids)
        tell(record)
        if path:
            self._files.submit(functools.partial(append, record, path))

    def end(self) -> None:
        """Nothing follows. Blocks until the records are written, for up to WRITE_LIMIT_S."""
        self.close()
        try:
            self._files.call(lambda: None, WRITE_LIMIT_S)
        except TimeoutError as error:
            logger.error("Records of recoveries could not be written: %s.", error)
        self._files.close()
