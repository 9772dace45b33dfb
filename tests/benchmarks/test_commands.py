"""The commands that judge real jobs, at their smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chaos
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def report_of(tmp_path: Path, *options: str) -> dict[str, Any]:
    """The report of a run of chaos, which must end well."""
    report = tmp_path / "chaos.json"
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), *options, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def test_chaos_ends_well_and_reports_each_fault(tmp_path: Path) -> None:
    found = report_of(tmp_path, "--faults", "5", "--seed", "2", "--ranks", "2")
    assert (found["faults"], found["survived"], found["equal"], found["seed"]) == (5, 5, True, 2)
    assert {"machine", "versions", "command"} <= found.keys()
    assert all(fault["rung"] in (1, 3, 4) and fault["seconds"] > 0 for fault in found["fault_list"])


@pytest.mark.slow
def test_chaos_shares_faults_of_all_kinds_between_layouts(tmp_path: Path) -> None:
    found = report_of(tmp_path, "--faults", "24", "--seed", "2", "--kinds", "all", "--layout", "ddp,hsdp")
    assert (found["faults"], found["survived"], found["equal"]) == (24, 24, True)
    assert [(run["layout"], run["faults"]) for run in found["runs"]] == [("ddp", 12), ("hsdp", 12)]
    kinds = {fault["kind"] for fault in found["fault_list"]}
    assert {"stop", "slow", "disk-full", "stopped-agent", "corrupted-memory"} < kinds
    assert found["longest_interruption_s"] == max(fault["seconds"] for fault in found["fault_list"])


def test_several_runs_make_one_report() -> None:
    runs = [
        {
            **dict.fromkeys(("faults", "survived", "stranded", "node_faults", "faults_asked_for"), number),
            "equal": number < 2,
            "seed": 7,
            "exit_code": number - 1,
            "rungs": {"1": number},
            "longest_interruption_s": seconds,
            "longest_interruption_cause": f"cause {number}",
            "layout": layout,
            "nodes": 1,
            "error": "",
            "fault_list": [{"kind": "stop"}],
            "lines": [],
        }
        for number, seconds, layout in ((1, 0.5, "ddp"), (2, 2.0, "hsdp"), (3, None, "hsdp"))
    ]
    found = chaos.together(runs)
    assert (found["faults"], found["survived"], found["equal"], found["exit_code"]) == (6, 6, False, 1)
    assert (found["longest_interruption_s"], found["longest_interruption_cause"]) == (2.0, "cause 2")
    assert (found["layout"], found["rungs"], len(found["fault_list"])) == ("ddp,hsdp", {"1": 6}, 3)
    assert {"machine", "versions", "command"} < found.keys()


def test_a_run_that_failed_has_its_place_in_the_report() -> None:
    (run,) = chaos.parse(["--faults", "7", "--layout", "hsdp", "--seed", "5"]).runs
    found = chaos.together([chaos.failed(run, "HostsError: no bridge")])
    assert (found["error"], found["exit_code"]) == ("hsdp, 1 nodes: HostsError: no bridge", 1)
    assert (found["faults"], found["faults_asked_for"], found["seed"], found["equal"]) == (0, 7, 5, False)


@pytest.mark.slow
def test_a_run_that_fails_is_marked_and_the_next_one_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, report = tmp_path / "train.py", tmp_path / "report.json"
    script.write_text("raise SystemExit(3)")
    options = ["--faults", "2", "--ranks", "2", "--layout", "ddp,hsdp", "--script", str(script)]
    monkeypatch.setattr(sys, "argv", ["chaos", *options, "--json", str(report)])
    assert chaos.main() == 1
    found = json.loads(report.read_text())
    why = "JobFailedError: train.py ended with exit code 1."
    assert [(run["layout"], run["equal"], run["faults_asked_for"]) for run in found["runs"]] == [
        ("ddp", False, 1),
        ("hsdp", False, 1),
    ]
    assert all(run["error"].startswith(why) for run in found["runs"])
    assert found["error"].startswith(f"ddp, 1 nodes: {why}")
    assert f"\n{found['error']}\n" in capsys.readouterr().out


@pytest.mark.slow
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
