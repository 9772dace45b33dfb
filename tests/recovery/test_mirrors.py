"""Shards that no other rank holds come back from mirrors in host memory, and no bit differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_mirrors.py")


def train(out: Path, every: int, die: str = "") -> Ended:
    options = ("--rdzv-conf", f"mirror_every={every}", "--max-restarts=0")
    return launch(out, ranks=2, script=SCRIPT, options=options, DIE=die)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault and without mirrors."""
    ended = train(tmp_path_factory.mktemp("whole"), every=0)
    assert ended.code == 0, ended.text
    return ended


def check(ended: Ended, oracle: Ended) -> None:
    assert ended.code == 0, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), oracle.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


@pytest.mark.parametrize(
    ("every", "faults"),
    [
        (1, "1:forward:3,0:backward:5,0:outside:7,1:forward:8"),
        pytest.param(1, "0:update:4,1:after:7", marks=pytest.mark.slow),
        pytest.param(1, "0:forward:4,1:forward:4,0:outside:6", marks=pytest.mark.slow),
        pytest.param(3, "1:backward:4,0:update:7", marks=pytest.mark.slow),
    ],
    ids=["before the gate", "after the gate", "all ranks", "every third step"],
)
def test_a_lost_shard_comes_back_from_its_mirror(
    every: int, faults: str, oracle: Ended, tmp_path: Path
) -> None:
    ended = train(tmp_path, every, faults)
    check(ended, oracle)
    found = ended.recoveries()
    assert found, ended.text
    assert {record["rung"] for record in found} == {2}, ended.text
    lost = [rank for record in found for rank in record["lost_ranks"]]
    assert {int(fault[0]) for fault in faults.split(",")} <= set(lost)


@pytest.mark.slow
def test_with_a_mirror_of_the_step_in_flight_the_survivor_keeps_its_process(
    oracle: Ended, tmp_path: Path
) -> None:
    ended = train(tmp_path, 1, "1:forward:4")
    check(ended, oracle)
    (record,) = ended.recoveries()
    assert record["lost_ranks"] == [1]
    assert "goes on from its mirror of step" in record["reason"]


def test_without_mirrors_the_first_step_warns_and_a_loss_ends_the_job_when_no_restart_is_left(
    tmp_path: Path,
) -> None:
    ended = train(tmp_path, 0, "1:forward:4")
    assert ended.code == 1
    assert "2 of 2 ranks hold state that no other rank holds (0, 1)" in ended.text
    assert "that of 0 at once of the others can" in ended.text
    assert "no survivor holds the state of rank 1" in ended.text


@pytest.mark.slow
def test_before_the_first_mirror_a_loss_runs_the_script_again(oracle: Ended, tmp_path: Path) -> None:
    options = ("--rdzv-conf", "mirror_every=4", "--max-restarts=1")
    ended = launch(tmp_path, ranks=2, script=SCRIPT, options=options, DIE="0:forward:2")
    check(ended, oracle)
    (record,) = ended.recoveries()
    assert record["rung"] == 3
    assert "the first mirror is not yet due" in record["reason"]
