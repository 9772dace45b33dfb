"""The harness judges jobs by their files: interruptions, weights, recoveries, reports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from harness.recoveries import phase_medians, read_recoveries, timeline
from harness.report import Bar, write_json
from harness.steps import Commit, interruption, last_line, pids, progress, read_log, step_seconds
from harness.weights import differences, folder_differences

S = 10**9


def commits(*lines: tuple[float, int, int]) -> list[Commit]:
    return [Commit(int(seconds * S), step, pid) for seconds, step, pid in lines]


def test_a_void_step_counts_as_one_lost_step() -> None:
    logs = {0: commits((1, 0, 7), (2, 1, 7), (5, 2, 7)), 1: commits((1, 0, 8), (2, 1, 8), (5.5, 2, 9))}
    found = interruption(logs, int(2.5 * S))
    assert found is not None
    assert (found.seconds, found.step, found.lost_steps) == (3.0, 2, 1)


def test_a_step_that_was_rolled_forward_is_not_lost() -> None:
    logs = {0: commits((2, 1, 7), (2.6, 2, 7), (5, 3, 7)), 1: commits((2, 1, 8), (5.5, 3, 9))}
    found = interruption(logs, int(2.5 * S))
    assert found is not None
    assert (found.step, found.lost_steps) == (3, 0)


def test_going_back_to_a_checkpoint_counts_every_step_done_again() -> None:
    logs = {rank: commits((1, 10, 7), (2, 11, 7), (3, 12, 7), (9, 10, 8), (10, 11, 8)) for rank in (0, 1)}
    found = interruption(logs, int(3.5 * S))
    assert found is not None
    assert (found.seconds, found.step, found.lost_steps) == (5.5, 10, 4)


def test_a_rank_that_never_comes_back_leaves_no_interruption_to_measure() -> None:
    assert interruption({0: commits((1, 0, 7), (5, 1, 7)), 1: commits((1, 0, 8))}, 2 * S) is None


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "steps-0.log"
    path.write_text("1000 0 7\n2000 1 7\n30")
    assert read_log(path) == [Commit(1000, 0, 7), Commit(2000, 1, 7)]
    assert last_line(path) == Commit(2000, 1, 7)


def test_progress_is_that_of_the_slowest_rank_and_minus_one_without_a_log(tmp_path: Path) -> None:
    (tmp_path / "steps-0.log").write_text("1000 0 7\n2000 1 7\n")
    (tmp_path / "steps-1.log").write_text("1000 0 8\n")
    assert progress(tmp_path, 2) == 0
    assert progress(tmp_path, 3) == -1


def test_processes_and_step_times_are_read_per_incarnation() -> None:
    log = commits((1, 0, 7), (2, 1, 7), (5, 2, 9), (6, 3, 9))
    assert pids({0: log}) == {0: [7, 9]}
    assert step_seconds(log) == [1.0, 1.0]


def test_weights_that_differ_in_one_bit_are_named() -> None:
    left = {"model": {"w": torch.zeros(3)}, "step": 4, "nan": torch.tensor(float("nan"))}
    right = {"model": {"w": torch.zeros(3)}, "step": 4, "nan": torch.tensor(float("nan"))}
    assert list(differences(left, right)) == []
    right["model"]["w"][1] = -0.0
    assert list(differences(left, right)) == ["state.model.w: tensors differ"]


@pytest.mark.parametrize("other", [[1, 2], (1,), (1, 3), None])
def test_nested_values_that_differ_are_found(other: object) -> None:
    assert list(differences((1, 2), other))


def test_a_missing_final_file_is_a_difference(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "final-0.pt")
    (tmp_path / "other").mkdir()
    assert folder_differences(tmp_path, tmp_path, 1) == []
    assert "has no final-0.pt" in folder_differences(tmp_path, tmp_path / "other", 1)[0]


def test_recoveries_are_read_and_shown(tmp_path: Path) -> None:
    record = {
        "generation": 1,
        "cause": "killed by SIGKILL",
        "lost_ranks": [2],
        "rung": 1,
        "reason": "every piece has a replica",
        "step": 40,
        "decision": "void",
        "phases": {"detect": 0.001, "replay": 0.099},
        "total_seconds": 0.1,
        "bytes_moved": 1 << 20,
        "pids": {"0": 11},
        "time": 5.0,
    }
    path = tmp_path / "recoveries.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = read_recoveries(path)
    assert (found.lost_ranks, found.rung, found.pids) == ((2,), 1, {0: 11})
    assert phase_medians([found, found]) == {"detect": 0.001, "replay": 0.099}
    assert "rank 2 lost, rung 1, step 40 void, 100 ms" in timeline(found)
    assert read_recoveries(tmp_path / "none") == []


def test_a_bar_says_whether_it_is_kept() -> None:
    assert str(Bar("ratio", 25.0, 20, at_least=True)) == "pass  ratio: 25 (at least 20)"
    assert str(Bar("median", 0.5, 0.3, " s")) == "FAIL  median: 0.5 s (at most 0.3 s)"


def test_a_report_is_written_only_where_it_was_asked_for(tmp_path: Path) -> None:
    write_json(None, {"a": 1})
    write_json(tmp_path / "new" / "report.json", {"a": 1})
    assert os.listdir(tmp_path) == ["new"]
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {"a": 1}
