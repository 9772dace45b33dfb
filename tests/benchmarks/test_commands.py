"""The commands that judge real jobs, at their smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_chaos_ends_well_and_reports_each_fault(tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    options = ["--faults", "5", "--seed", "2", "--ranks", "2", "--json", str(report)]
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert (found["faults"], found["survived"], found["equal"], found["seed"]) == (5, 5, True, 2)
    assert {"machine", "versions", "command"} <= found.keys()
    assert all(fault["rung"] in (1, 3, 4) and fault["seconds"] > 0 for fault in found["fault_list"])


def test_recovery_time_reports_both_launchers(tmp_path: Path) -> None:
    report = tmp_path / "recovery.json"
    options = ["--ranks", "2", "--repeats", "1", "--steps", "24", "--warm-up", "6", "--json", str(report)]
    command = [sys.executable, str(BENCHMARKS / "recovery_time.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["equal"]
    assert found["lost_steps"] <= 1
    assert found["torchrun_median_s"] > found["ours_median_s"] > 0
    assert found["phases"]
