"""The record of one recovery: from the loss to the first step committed after it, on the agent's clock.

Times are seconds. Phases, in the order of the path: *detect* (first sign to decision to act), *freeze* (all survivors
have said where they stand), *fork* (the replacement has a process id), *setup* (it has run the script up to its first
loop or step), *transfer* (state copied and verified), *forward* (it has gone on to the survivors' step), *rebuild*
(affected groups), *replay* (first committed step). Freeze runs beside fork and set-up, the others follow each other.
Where the number of ranks changes: *keep* (state is left behind). Where all run the script again: *rerun* (up to its
first loop or step, with their state; if none comes back, up to the first committed step). A fault during the recovery
starts it over: the time until then is *repeated*.

Numbers of groups (rebuilt, kept, lazy: left to their next use) are each that of the rank with most; ranks belong to
different groups.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

ORDER = (
    "detect",
    "repeated",
    "freeze",
    "keep",
    "rerun",
    "fork",
    "setup",
    "transfer",
    "forward",
    "rebuild",
    "replay",
)


@dataclass
class Recovery:
    """One recovery while it goes on. Marks are times on a monotonic clock.

    ``stuck_s``: for how long a rank that was ended for it had been stuck, before all else; 0 if none was.
    ``resize``: the number of ranks before and after it, empty if that stays.
    ``transfer_s``: of the slowest replacement; ``copying_s``: the part of it in which bytes were copied and verified.
    """

    generation: int
    rung: int
    cause: str
    lost: set[int]
    seen: float
    wall: float
    reason: str = ""
    step: int = 0
    decision: str = ""
    marks: dict[str, float] = field(default_factory=dict)
    causes: dict[int, str] = field(default_factory=dict)
    transfer_s: float = 0.0
    copying_s: float = 0.0
    bytes_moved: int = 0
    stuck_s: float = 0.0
    groups_rebuilt: int = 0
    groups_kept: int = 0
    groups_lazy: int = 0
    resize: tuple[int, ...] = ()

    def mark(self, point: str, now: float) -> None:
        """Note that ``point`` was reached; a fault during the recovery moves it later."""
        self.marks.setdefault("acted", self.marks.get("restarted", now))
        self.marks[point] = now

    def phases(self) -> dict[str, float]:
        """Seconds of each phase that was reached."""
        at = {"seen": self.seen, **self.marks}
        anew = "restarted" in at and "restored" not in at
        spans = {
            "detect": ("seen", "acted"),
            "repeated": ("acted", "opened"),
            "freeze": ("opened", "frozen"),
            "keep": ("frozen", "kept"),
            "rerun": ("restarted", "committed") if anew else ("kept", "restored"),
            "fork": ("opened", "forked"),
            "setup": ("forked", "arrived"),
            "forward": ("arrived", "restored"),
            "rebuild": ("restored", "resumed"),
            "replay": ("resumed", "committed"),
        }
        found = {
            name: max(0.0, at[end] - at[start])
            for name, (start, end) in spans.items()
            if {start, end} <= at.keys()
        }
        if "forward" in found:
            found["transfer"] = min(self.transfer_s, found["forward"])
            found["forward"] -= found["transfer"]
        return {name: found[name] for name in ORDER if name in found and (found[name] or name != "repeated")}

    def record(self, pids: dict[int, int]) -> dict[str, object]:
        """The record as it is written."""
        total = max(self.marks.values(), default=self.seen) - self.seen
        return {
            "generation": self.generation,
            "cause": self.cause,
            "causes": {str(rank): cause for rank, cause in sorted(self.causes.items())},
            "lost_ranks": sorted(self.lost),
            "rung": self.rung,
            "reason": self.reason,
            "step": self.step,
            "decision": self.decision,
            "phases": self.phases(),
            "total_seconds": total,
            "stuck_seconds": self.stuck_s,
            "bytes_moved": self.bytes_moved,
            "bandwidth": self.bytes_moved / self.transfer_s if self.transfer_s else 0.0,
            "transfer_seconds": self.copying_s,
            "groups_rebuilt": self.groups_rebuilt,
            "groups_kept": self.groups_kept,
            "groups_lazy": self.groups_lazy,
            "resize": list(self.resize),
            "pids": {str(rank): pid for rank, pid in sorted(pids.items())},
            "time": self.wall,
        }


def sentence(record: dict[str, object]) -> str:
    """One readable line for the log."""
    phases = record["phases"]
    assert isinstance(phases, dict)
    parts = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in phases.items())
    lost = record["lost_ranks"]
    assert isinstance(lost, list)
    total = record["total_seconds"]
    assert isinstance(total, float)
    gone = f"lost rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}" if lost else "lost no rank"
    resize = record.get("resize")
    if isinstance(resize, list) and resize:
        gone += f", went from {resize[0]} to {resize[-1]} ranks"
    return (
        f"[generation {record['generation']}] {gone} at step {record['step']}: {_causes(record)}; "
        f"rung {record['rung']} ({record['reason']}), {total * 1e3:.0f} ms: {parts}"
    )


def _causes(record: dict[str, object]) -> str:
    """Of each rank, where they differ."""
    causes = record["causes"]
    assert isinstance(causes, dict)
    if len(set(causes.values())) < 2:
        return str(record["cause"])
    return ", ".join(f"rank {rank} {cause}" for rank, cause in causes.items())


def tell(record: dict[str, object]) -> None:
    """Log the record.

    Without a phase there is nothing to add to what was said when the script was run again, or the job stopped.
    """
    if record["phases"]:
        logger.warning("%s", sentence(record))


def append(record: dict[str, object], path: str) -> None:
    """Append the record to the JSON lines in ``path``. Blocks as long as that file system does."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
    except OSError as error:
        logger.error("The record of this recovery could not be written to %s: %s", path, error)
