"""Real jobs with a worker that goes on living but not on: it is found, ended and replaced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch

HELD = "none of its threads gets to run"

HANGS = {
    "stopped": ("1:4:backward:freeze", "stopped by a signal"),
    "stopped in a collective": ("0:8:backward:pause,1:8:backward:freezesoon", "stopped by a signal"),
    # on a busy machine its listener may not get to answer in time
    "endless loop": ("1:12:forward:spin", f"in a call, job.py|in a call: {HELD}"),
    "interpreter held": ("1:16:forward:block", HELD),
    "deadlock in the loader": ("1:20:fetch:deadlock", "waiting for data, job.py"),
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault."""
    ended = launch(tmp_path_factory.mktemp("oracle"))
    assert ended.code == 0, ended.text
    return ended


def check(names: list[str], ended: Ended, oracle: Ended) -> None:
    assert ended.code == 0, ended.text
    for mine, theirs in zip(ended.finals(), oracle.finals(), strict=True):
        assert difference(mine, theirs) == ""
    for name, record in zip(names, ended.recoveries(), strict=True):
        assert record["lost_ranks"] == [1], ended.text
        assert record["cause"].startswith("was stuck for"), record
        assert re.search(HANGS[name][1], record["cause"]), record
        assert record["stuck_seconds"] > 0, record


def test_workers_that_hang_in_many_ways_are_found_and_replaced(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(
        tmp_path, ",".join(faults for faults, _ in HANGS.values()), CHECKPOINTLESS_HANG_SLACK="0.7"
    )
    check([*HANGS], ended, oracle)


@pytest.mark.slow
def test_of_three_workers_two_that_are_stopped_are_replaced(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:4:backward:freeze,2:4:backward:freeze", CHECKPOINTLESS_HANG_SLACK="0.7")
    assert ended.code == 0, ended.text
    lost = [rank for record in ended.recoveries() for rank in record["lost_ranks"]]
    assert sorted(lost) == [1, 2], ended.text
    assert {record["rung"] for record in ended.recoveries()} == {1}, ended.text
    for mine, theirs in zip(ended.finals(), oracle.finals(), strict=True):
        assert difference(mine, theirs) == ""


@pytest.mark.slow
def test_a_worker_that_is_stuck_in_its_first_call_has_the_script_run_again(
    oracle: Ended, tmp_path: Path
) -> None:
    options = ("--max-restarts", "1")
    ended = launch(tmp_path, "1:0:forward:spin", options=options, CHECKPOINTLESS_HANG_TIMEOUT="5")
    assert ended.code == 0, ended.text
    assert [record["rung"] for record in ended.recoveries()] == [3], ended.text
    for mine, theirs in zip(ended.finals(), oracle.finals(), strict=True):
        assert difference(mine, theirs) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_a_worker_that_hangs_is_found_and_replaced(name: str, oracle: Ended, tmp_path: Path) -> None:
    check([name], launch(tmp_path, HANGS[name][0], CHECKPOINTLESS_HANG_SLACK="0.7"), oracle)


@pytest.mark.slow
def test_a_worker_that_is_slow_once_is_given_longer_in_its_replay(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:8:forward:slow", CHECKPOINTLESS_HANG_SLACK="0.7")
    assert ended.code == 0, ended.text
    assert ended.recoveries(), ended.text
    for mine, theirs in zip(ended.finals(), oracle.finals(), strict=True):
        assert difference(mine, theirs) == ""


@pytest.mark.slow
def test_hangs_are_not_looked_for_when_that_is_switched_off(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:8:forward:slow", CHECKPOINTLESS_HANG_FACTOR="0")
    check([], ended, oracle)


@pytest.mark.slow
def test_a_rank_that_all_others_wait_for_in_each_step_is_named(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, SLOW_RANK="1")
    check([], ended, oracle)
    assert re.search(r"Rank 1 is slow: it needs \d{3,4} ms", ended.text)
    assert "Rank 0 is slow" not in ended.text
