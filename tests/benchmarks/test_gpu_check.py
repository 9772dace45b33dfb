"""gpu_check where no GPU is: what can be tried of it on the CPU, and what it says of parts that fail."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_ends_with_one_sentence() -> None:
    done = ended()
    assert done.returncode == 2
    assert done.stderr == f"{gpu_check.NO_GPU}\n"
    assert done.stdout == ""


@pytest.mark.slow
def test_on_the_cpu_transfers_and_the_abort_go_the_same_way(tmp_path: Path) -> None:
    parts = "abort,process_to_process"
    done = ended("--device", "cpu", "--quick", "--ranks", "2", "--only", parts, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    assert list(report["parts"]) == parts.split(",")
    assert report["ok"]
    assert 0 < report["parts"]["abort"]["median_s"] < 30  # not the group's time limit
    assert {"machine", "versions", "command", "accelerator"} <= report.keys()
    assert "## process_to_process: ok" in (tmp_path / "gpu_check_cpu.md").read_text()


@pytest.mark.slow
def test_a_part_that_fails_is_named_with_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    """One rank cannot lose another, and hsdp takes no odd number."""
    parts = ("--only", "abort,broadcast,recovery_hsdp")
    done = ended("--device", "cpu", "--quick", "--ranks", "1", *parts, "--out", str(tmp_path))
    assert done.returncode == 1
    report = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    assert [part["ok"] for part in report["parts"].values()] == [False, True, False]
    assert report["parts"]["recovery_hsdp"]["error"]
    assert "## recovery_hsdp: not ok" in (tmp_path / "gpu_check_cpu.md").read_text()


def test_a_part_that_hangs_is_ended_at_its_limit() -> None:
    options = argparse.Namespace(device="cpu", sharing="hostid", given=["--device", "cpu"], limit=0.2)
    found = gpu_check.in_own_process(gpu_check.PARTS[0], options, 0.2)
    assert found == {"ok": False, "error": "It did not end within 0 s."}
    assert "was not begun" in gpu_check.in_own_process(gpu_check.PARTS[0], options, 0.0)["error"]
