"""Tensor parallel, pipeline stages, and shards with tensor parallel: real jobs with two faults each at other moments.

The job is the one that scripts/chaos strikes, with a schedule of its own for each layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "jobs" / "chaos_job.py"
STEPS = 10  # one epoch
Struck = tuple[str, int, tuple[int, ...]]
FAULTS: dict[str, list[Struck]] = {
    "tp": [("forward", 2, (3,)), ("after the loop", STEPS, (0,))],
    "pp": [("ready", 2, (0,)), ("evaluation", 6, (1, 3))],
    "hsdp_tp": [("update", 2, (0, 3)), ("saving", 6, (1,))],
}


def run(out: Path, layout: str, faults: list[dict[str, Any]], backend: str = "checkpointless") -> Ended:
    (out / "faults").mkdir(parents=True)
    entries = [{"number": number, "kind": "SIGKILL", **fault} for number, fault in enumerate(faults)]
    (out / "faults.json").write_text(json.dumps(entries))
    env = {"BENCH_DIR": str(out), "BENCH_STEPS": str(STEPS), "BENCH_LAYOUT": layout}
    return launch(out, ranks=4, script=SCRIPT, backend=backend, **env)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FAULTS)
def test_lost_ranks_change_no_bit(layout: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", layout, [], backend="c10d")
    assert whole.code == 0, whole.text
    faults = [{"moment": moment, "step": step, "ranks": ranks} for moment, step, ranks in FAULTS[layout]]
    ended = run(tmp_path / "lost", layout, faults)
    assert ended.code == 0, ended.text
    struck = {path.name for path in (tmp_path / "lost" / "faults").iterdir()}
    assert {f"{n}-{rank}" for n, fault in enumerate(FAULTS[layout]) for rank in fault[2]} <= struck
    assert {record["rung"] for record in ended.recoveries()} == {1}, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


@pytest.mark.slow
def test_nobody_waits_for_a_survivor_that_had_not_begun_the_step(tmp_path: Path) -> None:
    """Rank 0 waits for rank 1 in a group without a lost rank, and rank 1 hears of the loss before its step."""
    late = {"kind": "slow", "moment": "data", "step": 2, "ranks": (1,), "delay": 1.0}
    ended = run(tmp_path, "tp", [{"moment": "forward", "step": 2, "ranks": (3,)}, late])
    assert ended.code == 0, ended.text
    assert [record["rung"] for record in ended.recoveries()] == [1], ended.text
