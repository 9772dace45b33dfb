"""Faults that come again are answered by the next rung; and how a job ends when none is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault."""
    ended = launch(tmp_path_factory.mktemp("calm"))
    assert ended.code == 0, ended.text
    return ended


def check(ended: Ended, calm: Ended) -> None:
    assert ended.code == 0, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), calm.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


def settings(*values: str, restarts: int = 0) -> tuple[str, ...]:
    return ("--rdzv-conf", ",".join(values), f"--max-restarts={restarts}")


def root_cause(ended: Ended) -> tuple[str, str]:
    """(rank, exit code) in torchrun's summary."""
    assert "ChildFailedError" in ended.text, ended.text
    text = ended.text[ended.text.index("Root Cause (first observed failure):") :]
    found = re.search(r"rank +: (\d+) .*\n *exitcode +: (-?\d+)", text)
    assert found is not None, text
    return found[1], found[2]


def test_a_survivor_that_is_stuck_in_a_recovery_is_replaced_and_the_others_stay(
    calm: Ended, tmp_path: Path
) -> None:
    # rank 1 waits, so that rank 2 is stopped before it can hear of the loss
    faults = "2:5:start:freeze,1:5:start:pause,1:5:forward:kill"
    ended = launch(tmp_path, faults, options=settings("settle_timeout=4"))
    check(ended, calm)
    (record,) = ended.recoveries()
    assert (record["rung"], record["lost_ranks"]) == (1, [1, 2]), ended.text
    assert record["reason"] == "every piece of state has a replica in a survivor"
    what = "ranks [2] did not come out of state freezing in time"
    assert record["causes"] == {"1": "was killed by SIGKILL", "2": f"was ended: {what}"}
    assert f"[generation 1, step 5] {what}: rung 1, they are ended and replaced" in ended.text
    assert "[generation 2, step 5] rank 2 was ended: rung 1, every piece of state" in ended.text
    assert [len(ended.pids(rank)) for rank in range(3)] == [1, 2, 2]


@pytest.mark.slow
def test_a_replacement_that_is_stuck_is_started_once_more(calm: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:5:forward:kill,1:0:setup:freeze", options=settings("join_timeout=20"))
    check(ended, calm)
    (record,) = ended.recoveries()
    assert (record["rung"], record["lost_ranks"]) == (1, [1]), ended.text
    assert "ranks [1] did not come out of state settling in time: rung 1" in ended.text


@pytest.mark.slow
def test_faults_without_a_step_between_them_lead_to_rung_3(calm: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:5:forward:kill3", options=settings("max_faults_per_step=2", restarts=1))
    check(ended, calm)
    assert [record["rung"] for record in ended.recoveries()][-1] == 3, ended.text
    assert "3 faults at step 5 without a committed step between them" in ended.recoveries()[-1]["reason"]


@pytest.mark.slow
def test_faults_before_the_first_step_of_a_run_by_rung_3_lead_to_rung_4(calm: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:0:backward:kill2", options=settings(restarts=2))
    check(ended, calm)
    assert [record["rung"] for record in ended.recoveries()][-1] == 4, ended.text
    assert "no step was committed since the script was run again by rung 3" in ended.text


@pytest.mark.slow
def test_without_a_restart_left_torchrun_names_the_first_rank_that_was_lost_although_it_was_replaced(
    tmp_path: Path,
) -> None:
    faults = "1:5:forward:exit,0:5:backward:kill"
    ended = launch(tmp_path, faults, options=settings("max_faults_per_step=1"))
    assert ended.code == 1, ended.text
    assert (
        "no restart is left (--max-restarts is 0) and one is needed: rung 3: 2 faults at step 5" in ended.text
    )
    assert root_cause(ended) == ("1", "7"), ended.text
