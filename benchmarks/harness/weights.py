"""Compares what two of our jobs ended with, bit for bit."""

from __future__ import annotations

from pathlib import Path

from checkpointless_elastic.chaos.compare import differences, load

__all__ = ["differences", "folder_differences"]


def folder_differences(left: Path, right: Path, ranks: int) -> list[str]:
    """Where the final-<rank>.pt files of two jobs differ; a missing file is a difference."""
    found: list[str] = []
    for rank in range(ranks):
        name = f"final-{rank}.pt"
        missing = [str(folder) for folder in (left, right) if not (folder / name).exists()]
        if missing:
            found += [f"{folder} has no {name}" for folder in missing]
        else:
            found += differences(load(left / name), load(right / name), f"rank {rank}")
    return found
