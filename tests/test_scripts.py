"""The scripts at the top of the repository: what they check, and that their options can be asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointless_elastic import Config

ROOT = Path(__file__).parents[1]
RUNNABLE = [
    "scripts/setup",
    "scripts/check",
    "scripts/test",
    "scripts/demo",
    "scripts/chaos",
    "scripts/gpu_check",
    ".ci/run",
]


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_script_is_executable_and_valid_bash(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", name], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["recovery_time", "steady_state", "chaos", "demo"])
def test_a_command_explains_itself(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--ranks" in done.stdout
    assert name == "demo" or ("--json" in done.stdout and "BENCH_DIR" in done.stdout)


def test_the_constraints_pin_torch_and_nothing_else() -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["torch==2.13.0"]


def test_long_functions_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "long.py").write_text("def f():\n" + "    pass\n" * 460)
    command = [sys.executable, str(ROOT / "scripts" / "check_sizes.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "long.py: 461 lines" in done.stdout
    assert "f has 461 lines" in done.stdout


def test_the_readme_lists_every_setting_with_its_default() -> None:
    text = (ROOT / "README.md").read_text()
    for name, default, meaning in Config.describe():
        assert f"| `{name}` | {default or 'none'} | {meaning} |" in text


def test_results_go_between_the_markers_of_the_readme(tmp_path: Path) -> None:
    report = {"seed": 3, "survived": 9, "faults": 9, "equal": True, "longest_interruption_s": 0.5}
    machine = {"cores": 2, "processor": "some", "memory_gib": 23.5, "gpus": 0, "system": "Linux"}
    report |= {"machine": machine, "versions": {"python": "3.11", "torch": "2.13.0"}}
    (tmp_path / "chaos.json").write_text(json.dumps(report))
    program = (
        "import sys, pathlib, summary; print(summary.put('a\\n<!-- results -->old<!-- end of results -->b', "
    )
    program += "summary.summary(pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
    assert "9 of 9 faults survived, final state equal, longest interruption 0.50 s" in done.stdout
    assert "old" not in done.stdout
    assert done.stdout.endswith("<!-- end of results -->b\n")
