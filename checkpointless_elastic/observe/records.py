"""Reads the JSON lines that agents write about recoveries (`observe.timeline`): one record for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Recovery", "read_recoveries"]


@dataclass(frozen=True)
class Recovery:
    """One recovery as the library saw it.

    Attributes:
        generation: the membership that it led to.
        cause: what was lost and why, one sentence.
        lost_ranks: ranks whose worker was gone.
        rung: how it was answered, 1 to 4.
        reason: why this rung, one sentence.
        step: the step at which all ranks went on.
        decision: "void" or "roll_forward"; empty where there was none to take.
        phases: seconds by phase, in order.
        seconds: from the loss to the first committed step.
        bytes_moved: state that was copied.
        transfer_seconds: in which it was copied and verified.
        groups_kept, groups_rebuilt, groups_lazy: process groups of a rank; lazy ones are connected when they are used.
        pids: process of each rank afterwards.
        time: unix time of the loss.
    """

    generation: int
    cause: str
    lost_ranks: tuple[int, ...]
    rung: int
    reason: str
    step: int
    decision: str
    phases: dict[str, float]
    seconds: float
    bytes_moved: int
    transfer_seconds: float
    groups_kept: int
    groups_rebuilt: int
    groups_lazy: int
    pids: dict[int, int]
    time: float


def read_recoveries(path: Path) -> list[Recovery]:
    """All recoveries that have ended, in order; without a line that is being written. Empty without the file."""
    text = path.read_text() if path.exists() else ""
    return [_record(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def _record(raw: dict[str, object]) -> Recovery:
    phases, lost, pids = raw.get("phases") or {}, raw.get("lost_ranks") or (), raw.get("pids") or {}
    assert isinstance(phases, dict)
    assert isinstance(pids, dict)
    assert isinstance(lost, (list, tuple))
    return Recovery(
        generation=int(str(raw["generation"])),
        cause=str(raw.get("cause", "")),
        lost_ranks=tuple(int(rank) for rank in lost),
        rung=int(str(raw["rung"])),
        reason=str(raw.get("reason", "")),
        step=int(str(raw.get("step", -1))),
        decision=str(raw.get("decision") or ""),
        phases={str(name): float(seconds) for name, seconds in phases.items()},
        seconds=float(str(raw.get("total_seconds", 0.0))),
        bytes_moved=int(str(raw.get("bytes_moved", 0))),
        transfer_seconds=float(str(raw.get("transfer_seconds", 0.0))),
        groups_kept=int(str(raw.get("groups_kept", 0))),
        groups_rebuilt=int(str(raw.get("groups_rebuilt", 0))),
        groups_lazy=int(str(raw.get("groups_lazy", 0))),
        pids={int(rank): int(pid) for rank, pid in pids.items()},
        time=float(str(raw.get("time", 0.0))),
    )
