"""benchmarks/control_plane.py with few agents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    path = tmp_path_factory.mktemp("control-plane") / "report.json"
    options = ["--agents", "4,7", "--repeats", "2", "--processes", "2", "--json", str(path)]
    command = [sys.executable, str(BENCHMARKS / "control_plane.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agents: recovery") == 2
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_every_number_of_agents_has_times_of_both_ways(
    report: dict[str, dict[str, dict[str, float]]],
) -> None:
    assert report["agents"].keys() == {"4", "7"}
    names = ("recovery_ms", "commit_ms", "store_only_recovery_ms", "store_only_commit_ms")
    assert all(row[name] > 0 for row in report["agents"].values() for name in names)
    assert all(row["resumed_ms"] > row["recovery_ms"] for row in report["agents"].values())
    assert {"machine", "versions", "command"} <= report.keys()


def test_messages_are_counted_for_a_step_and_for_a_recovery(
    report: dict[str, dict[str, dict[str, float]]],
) -> None:
    for agents, row in report["agents"].items():
        assert row["messages_per_agent"] == 2  # ready, and commit
        assert 2 <= row["coordinator_messages"] <= 2 * (int(agents) - 1)
        assert 2 < row["messages_per_agent_recovery"] < 10
