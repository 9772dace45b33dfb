"""Writes a report as JSON and the bars it was measured against as lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """A limit that a figure should keep; printed, not enforced, since machines differ."""

    name: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        word = "at least" if self.at_least else "at most"
        verdict = "pass" if self.kept else "FAIL"
        return f"{verdict}  {self.name}: {self.value:.4g}{self.unit} ({word} {self.limit:g}{self.unit})"


def write_json(path: Path | None, report: dict[str, object]) -> None:
    """Writes the report where --json said; does nothing without it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def print_bars(bars: list[Bar]) -> None:
    for bar in bars:
        print(bar)
