"""A worker's pulse: what it is doing since when, in memory that its agent reads.

Writing costs a few stores to memory and no message, and it can be read of a process that is stopped. Each word is
written in one piece; a reader may meet words of two moments, and takes nothing as certain that it saw only once.

What most often follows a call stands there too, in place of writes to the slot: that it has returned, with what small
value, and that its loop has gone on.

A limit is learned for each kind of thing that takes time, the calls of one function, or the items of one loop: how long
it takes at most, forgotten slowly. What was learned outlives the worker, its replacement goes on with it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from dataclasses import dataclass

from checkpointless_elastic.protocol.hangs import Activity

__all__ = ["Monitor", "Pulse", "Reading", "pulse_path"]

_ACTIVITY, _SINCE, _EXPECTED, _STRETCH, _USED, _OWN, _STEP = range(7)
_GROUPS = 63
_KINDS = 32
_NAMES = 8  # then the number of each group, then their counts, the last of which is of all that have no place
_COUNTS = _NAMES + _GROUPS
_LEARNED = _COUNTS + _GROUPS + 1  # then number, samples and nanoseconds of each kind
_RETURNED = _LEARNED + 3 * _KINDS  # record of the slot whose call has returned, length of its value
_ADVANCED = _RETURNED + 2  # the record after which the loop went to its next iteration
_VALUE = 8 * (_ADVANCED + 1)
_VALUE_BYTES = 256
_SIZE = _VALUE + _VALUE_BYTES
ENOUGH = 3
"""Times that something must have been done before a limit is known for it; the first of each process does not count."""
_KEEP = 0.999
"""Of what something took at most, after each time: half is left after 700 times. Some things take long now and then."""
_FRESH = 10
"""Times that something may take longer when a process does it for the first time."""
_AVERAGED = 8
_NOTHING = memoryview(bytes(8 * (_GROUPS + 1))).cast("q")


def pulse_path(run_dir: str, rank: int) -> str:
    """Where a rank's pulse is."""
    return os.path.join(run_dir, f"pulse-{rank}")


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _open(path: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, _SIZE)
        return mmap.mmap(descriptor, _SIZE)
    finally:
        os.close(descriptor)


class Pulse:
    """The worker's side. Used by the main thread; collectives are counted by whoever issues them.

    Attributes:
        counts: of collectives, by `place`.
    """

    def __init__(self, path: str) -> None:
        self._memory = _open(path)
        self._words = words = memoryview(self._memory).cast("q")
        words[_SINCE] = time.monotonic_ns()
        words[_ACTIVITY] = Activity.SETUP
        words[_USED] = 0
        self.counts = words[_COUNTS : _COUNTS + _GROUPS + 1]
        self.counts[:] = _NOTHING
        self._places: dict[str, int] = {}
        self._kinds = {words[at]: at for at in range(_LEARNED, _LEARNED + 3 * _KINDS, 3) if words[at]}
        self._named: dict[str, int] = {}
        self._kind = 0
        self._fresh = True
        self._began = 0
        self._usual = 0
        self._fetching = 0  # nanoseconds for the data of the call that comes
        self._alone = 0  # nanoseconds from the start of a call to its first collective; -1: none is going on

    def place(self, group: str) -> int:
        """Where the collectives of this group are counted."""
        if group not in self._places:
            place = min(len(self._places), _GROUPS)
            self._places[group] = place
            if place < _GROUPS:
                self._words[_NAMES + place] = _number(group)
                self._words[_USED] = place + 1
        return self._places[group]

    def begin(self, activity: Activity, kind: str, stretch: int) -> None:
        """Something begins that will take about as long as what was done before under the name ``kind``."""
        words = self._words
        at = self._named.get(kind)
        self._fresh = at is None
        if at is None:
            at = self._named[kind] = self._place_of_kind(kind)
        self._kind = at
        expected = words[at + 2] if at and words[at + 1] >= ENOUGH else 0
        words[_EXPECTED] = expected * _FRESH if self._fresh else expected
        self._stretch(stretch)
        self._alone = 0 if activity is Activity.CALL else -1
        self._began = words[_SINCE] = time.monotonic_ns()
        words[_ACTIVITY] = activity

    def first(self) -> None:
        """The first collective of some group is issued."""
        if not self._alone:
            self._alone = time.monotonic_ns() - self._began

    def turn(self, activity: Activity) -> None:
        """The same goes on, in another way: a call waits at its gate, or recovers."""
        self._words[_ACTIVITY] = activity

    def end(self, stretch: int, *, learn: bool = True) -> None:
        """It has ended; ``learn`` if it went as usual."""
        words, now, at = self._words, time.monotonic_ns(), self._kind
        if learn:
            took = now - self._began
            if at and not self._fresh:
                if words[at + 1] < ENOUGH:
                    words[at + 1] += 1
                words[at + 2] = max(took, int(words[at + 2] * _KEEP))
            self._pace(took)
        expected = words[_EXPECTED]
        if expected:
            self._usual, words[_EXPECTED] = expected, 0
        self._stretch(stretch)
        words[_SINCE] = now
        words[_ACTIVITY] = Activity.OUTSIDE

    def idle(self, activity: Activity, stretch: int) -> None:
        """From here on this rank only waits for others, which should not take longer than what was done last."""
        words = self._words
        words[_EXPECTED], words[_STRETCH] = self._usual, stretch
        self.counts[:] = _NOTHING
        words[_SINCE] = time.monotonic_ns()
        words[_ACTIVITY] = activity

    def keep(self, record: int, value: bytes | None) -> bool:
        """The call whose rank was ready as this record of its slot says has returned; None: its value is not kept.

        False: the value is too large. Whole at every moment: the record's number is written last.
        """
        if value is not None:
            if len(value) > _VALUE_BYTES:
                return False
            self._memory[_VALUE : _VALUE + len(value)] = value
            self._words[_RETURNED + 1] = len(value)
            self._words[_RETURNED] = record
        return True

    def kept(self, record: int) -> bytes | None:
        """The value that the call has returned, perhaps in the worker that this one replaces."""
        words = self._words
        end = _VALUE + words[_RETURNED + 1]
        return self._memory[_VALUE:end] if words[_RETURNED] == record else None

    def advance(self, record: int) -> None:
        """It has returned, then its loop has gone to the next iteration, and nothing else has happened."""
        self._words[_ADVANCED] = record

    def advanced(self, record: int) -> bool:
        """Whether that was so, perhaps in the worker that this one replaces."""
        return self._words[_ADVANCED] == record

    def _pace(self, took: int) -> None:
        """Averages over some steps of this rank's own part and of the whole, see `protocol.pace`."""
        words = self._words
        if self._alone < 0:
            self._fetching = took
            return
        own, step = self._fetching + (self._alone or took), self._fetching + took
        share = _AVERAGED if words[_STEP] else 1
        words[_OWN] += (own - words[_OWN]) // share
        words[_STEP] += (step - words[_STEP]) // share
        self._alone, self._fetching = -1, 0

    def _stretch(self, stretch: int) -> None:
        if self._words[_STRETCH] != stretch:
            self._words[_STRETCH] = stretch
            self.counts[:] = _NOTHING

    def _place_of_kind(self, kind: str) -> int:
        number = _number(kind)
        at = self._kinds.get(number)
        if at is None:
            if len(self._kinds) == _KINDS:
                return 0  # no limit is learned for it
            at = self._kinds[number] = _LEARNED + 3 * len(self._kinds)
            self._words[at] = number
        return at


@dataclass(frozen=True)
class Reading:
    """A worker's pulse at one moment.

    Attributes:
        activity, stretch, issued: see `protocol.hangs.Where`.
        since: when it began, in nanoseconds of the monotonic clock.
        expected: how long it takes at most, as was learned, in nanoseconds; 0: not known.
    """

    activity: Activity
    since: int
    expected: int
    stretch: int
    issued: dict[int, int]


class Monitor:
    """The agent's side of one rank's pulse."""

    def __init__(self, path: str) -> None:
        self._words = memoryview(_open(path)).cast("q")

    def glance(self) -> tuple[int, int, int]:
        """Activity, since and expected of `Reading`."""
        words = self._words
        return words[_ACTIVITY], words[_SINCE], words[_EXPECTED]

    def pace(self) -> tuple[float, float]:
        """Seconds of a step: the rank's own part, and all."""
        return self._words[_OWN] / 1e9, self._words[_STEP] / 1e9

    def read(self) -> Reading:
        """What the worker last wrote."""
        words = self._words
        used = max(0, min(words[_USED], _GROUPS))
        issued = {words[_NAMES + place]: words[_COUNTS + place] for place in range(used)}
        activity = words[_ACTIVITY]
        known = Activity(activity) if 0 <= activity < len(Activity) else Activity.SETUP
        return Reading(known, words[_SINCE], words[_EXPECTED], words[_STRETCH], issued)
