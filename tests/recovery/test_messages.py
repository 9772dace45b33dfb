"""A worker dies right after each message that it sends or takes, and no bit of the result differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_messages.py")
FIRST = "1:5:forward:kill"
"""The loss that opens the recovery in which the second one falls: rank 1, in its sixth step."""

IN_A_STEP = ["0:0:sent:vote:5", "0:0:sent:last vote:4", "0:0:taken:count:5"]
SURVIVOR = [
    "0:0:taken:Freeze:1", "0:0:sent:Frozen:1", "0:0:taken:Decision:1", "0:0:sent:Report.published:1",
    "0:0:taken:Rebuild:1", "0:0:sent:Report.rebuilt:1", "0:0:taken:Resume:1", "0:0:sent:Report.ready:2",
    "0:0:taken:Commit:2", "0:0:sent:vote:7",
]  # fmt: skip
REPLACEMENT = [
    "1:1:sent:Protected:1", "1:1:taken:Decision:1", "1:1:sent:Report.arrived:1", "1:1:taken:Restore:1",
    "1:1:sent:Report.restored:1", "1:1:taken:Rebuild:1", "1:1:sent:Report.rebuilt:1", "1:1:taken:Resume:1",
    "1:1:sent:Report.ready:1", "1:1:taken:Commit:1", "1:1:sent:vote:1",
]  # fmt: skip
AT_THE_START = ["0:0:sent:Protected:1", "0:0:sent:Replicas:1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault."""
    ended = launch(tmp_path_factory.mktemp("oracle"), script=SCRIPT)
    assert ended.code == 0, ended.text
    return ended


def check(ended: Ended, oracle: Ended, code: int = 0) -> None:
    assert ended.code == code, ended.text
    assert (ended.out / "point").exists(), "the fault never happened"
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), oracle.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == ""


@pytest.mark.parametrize("point", IN_A_STEP)
def test_a_worker_is_lost_at_a_message_of_a_step(point: str, oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, script=SCRIPT, POINT=point)
    check(ended, oracle)
    assert [record["rung"] for record in ended.recoveries()] == [1], ended.text


@pytest.mark.parametrize("point", SURVIVOR + REPLACEMENT)
def test_a_worker_is_lost_at_a_message_of_a_recovery(point: str, oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, FIRST, script=SCRIPT, POINT=point)
    check(ended, oracle)
    assert {record["rung"] for record in ended.recoveries()} == {1}, ended.text
    assert ended.recoveries()[-1]["generation"] == 2, ended.text


@pytest.mark.parametrize("point", AT_THE_START)
def test_a_worker_is_lost_before_its_state_is_known_to_have_replicas(
    point: str, oracle: Ended, tmp_path: Path
) -> None:
    ended = launch(tmp_path, script=SCRIPT, options=("--max-restarts=1",), POINT=point)
    check(ended, oracle)


def test_a_worker_that_is_lost_when_all_have_finished_fails_the_job_as_under_torchrun(
    oracle: Ended, tmp_path: Path
) -> None:
    ended = launch(tmp_path, script=SCRIPT, POINT="0:0:taken:Release:1")
    check(ended, oracle, code=1)
    assert "all ranks had finished, but these ended badly: rank 0 with code -9" in ended.text
