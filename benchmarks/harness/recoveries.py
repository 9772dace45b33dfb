"""Figures and lines about the recoveries of a job."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from checkpointless_elastic.observe.records import Recovery, read_recoveries

__all__ = ["Recovery", "phase_medians", "read_recoveries", "timeline", "transfer_medians"]


def phase_medians(recoveries: Sequence[Recovery]) -> dict[str, float]:
    names = dict.fromkeys(name for recovery in recoveries for name in recovery.phases)
    return {name: median(r.phases[name] for r in recoveries if name in r.phases) for name in names}


def transfer_medians(recoveries: Sequence[Recovery]) -> dict[str, object]:
    """What was rebuilt and copied; zeros without a recovery."""
    names = ("groups_kept", "groups_rebuilt", "groups_lazy", "bytes_moved", "transfer_seconds")
    return {name: median([getattr(recovery, name) for recovery in recoveries] or [0]) for name in names}


def timeline(recovery: Recovery, width: int = 40) -> str:
    """A few lines for a terminal: what happened, and a bar per phase."""
    ranks = ", ".join(map(str, recovery.lost_ranks))
    head = (
        f"generation {recovery.generation}: {recovery.cause}; rank {ranks} lost, rung {recovery.rung}, "
        f"step {recovery.step} {recovery.decision.replace('_', ' ')}, {recovery.seconds * 1e3:.0f} ms"
    )
    scale = width / max(recovery.seconds, 1e-9)
    bars = [
        f"    {name:<18}{seconds * 1e3:8.1f} ms  {'#' * min(width, round(seconds * scale))}"
        for name, seconds in recovery.phases.items()
    ]
    moved = [f"    {recovery.bytes_moved / 2**20:.1f} MiB copied"] if recovery.bytes_moved else []
    return "\n".join([head, *bars, *moved])
