"""Judges what each fault of a schedule did to a job, by the job's logs and the library's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.faults import FLIP, NODE_KINDS, STORE_KINDS, Fault, marker

from harness.recoveries import Recovery
from harness.steps import Logs, interruption


@dataclass(frozen=True)
class Outcome:
    """What one fault did.

    Attributes:
        fault: as it was scheduled.
        rung: how the library answered; None when no record names it.
        seconds: from the fault to the first step committed by all ranks; None when that was not seen.
        struck: whether it came to pass.
        reason: why this rung.
    """

    fault: Fault
    rung: int | None
    seconds: float | None
    struck: bool
    reason: str = ""

    @property
    def missed(self) -> bool:
        """Whether the job did not find what does not show by itself."""
        return self.struck and self.fault.kind == FLIP and self.rung is None

    @property
    def cause(self) -> str:
        """The fault and its answer, in short."""
        fault = self.fault
        what = f"{fault.kind} of ranks {', '.join(map(str, fault.ranks))} ({fault.target}), {fault.moment}"
        return f"{what}, answered by rung {self.rung} ({self.reason})" if self.rung else what

    def entry(self) -> dict[str, object]:
        fault = self.fault
        return {
            "kind": fault.kind,
            "moment": fault.moment,
            "rung": self.rung,
            "seconds": self.seconds,
            "target": fault.target,
            "ranks": list(fault.ranks),
            "step": fault.step,
            "struck": self.struck,
        }

    def __str__(self) -> str:
        fault = self.fault
        place = f"ranks {fault.ranks} ({fault.target}), {fault.moment}, step {fault.step}"
        passes = fault.lasts or fault.kind in STORE_KINDS
        rung = f"rung {self.rung}" if self.rung else "nobody lost" if passes else "no record"
        seconds = f"{self.seconds:.3f} s" if self.seconds is not None else "no step after it"
        return f"{fault.number:3} {fault.kind:<16} {place:<62} {rung}, {seconds if self.struck else 'not struck'}"


def struck_at(folder: Path, fault: Fault) -> list[int]:
    """When the fault struck each of its ranks so far, in nanoseconds."""
    paths = [marker(folder, fault.number, rank) for rank in fault.ranks]
    return [int(text) for path in paths if path.exists() and (text := path.read_text())]


def as_struck(folder: Path, fault: Fault) -> Fault:
    """A node's fault with the ranks that it took; others as they are."""
    if fault.kind not in (*NODE_KINDS, *STORE_KINDS):
        return fault
    taken = (path.name.split("-")[1] for path in folder.glob(f"faults/{fault.number}-*"))
    return replace(fault, ranks=tuple(sorted(map(int, taken))))


def outcome(fault: Fault, folder: Path, logs: Logs, recoveries: Sequence[Recovery]) -> Outcome:
    times = struck_at(folder, fault)
    if not times:
        return Outcome(fault, None, None, struck=False)
    end = end_of(logs, fault, max(times))
    seconds = (end - min(times)) / 1e9 if end else None
    answer = next((recovery for recovery in recoveries if answers(recovery, fault, times, end)), None)
    if answer is None:
        return Outcome(fault, None, seconds, struck=True)
    return Outcome(fault, answer.rung, seconds, struck=True, reason=answer.reason)


def answers(recovery: Recovery, fault: Fault, times: Sequence[int], end: int | None) -> bool:
    """Whether this recovery is the answer to a fault that struck at these times and was over at `end`."""
    begun, ended = recovery.time * 1e9, (recovery.time + recovery.seconds) * 1e9
    return bool(set(fault.ranks) & set(recovery.lost_ranks)) and ended > max(times) and begun < (end or ended)


def end_of(logs: Logs, fault: Fault, struck_ns: int) -> int | None:
    """When all ranks had committed a common step after the fault, in nanoseconds; None if they never did. After the
    last step the others may have finished before the fault: then when the struck ranks had finished too."""
    cost = interruption(logs, struck_ns)
    if cost is not None:
        return struck_ns + round(cost.seconds * 1e9)
    later = [[c.time_ns for c in logs[rank] if c.time_ns > struck_ns] for rank in fault.ranks]
    return max(min(times) for times in later) if all(later) else None
