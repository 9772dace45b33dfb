"""A job with several groups: which of them a recovery rebuilds, keeps, and leaves to their next use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_groups.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault."""
    ended = launch(tmp_path_factory.mktemp("whole"), ranks=4, script=SCRIPT)
    assert ended.code == 0, ended.text
    return ended


def lose_rank_1(die: str, whole: Ended, out: Path) -> dict[str, Any]:
    """The record of its recovery; the result must be that of the whole job."""
    ended = launch(out, ranks=4, script=SCRIPT, DIE=die)
    assert ended.code == 0, ended.text
    finals = ended.finals()
    assert [final["values"] for final in finals] == [(9, value, 10.0) for value in (0.0, 7.5, 7.5, 0.0)]
    for rank, (mine, theirs) in enumerate(zip(finals, whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
    (record,) = ended.recoveries()
    assert (record["rung"], record["lost_ranks"]) == (1, [1]), ended.text
    return record


def test_groups_in_use_are_rebuilt_or_kept_and_others_are_connected_when_they_are_used_again(
    whole: Ended, tmp_path: Path
) -> None:
    record = lose_rank_1("late", whole, tmp_path)
    assert record["groups_rebuilt"] == 1, "the half of rank 1"
    assert record["groups_kept"] == 1, "the other half"
    assert record["groups_lazy"] == 2, "on ranks 1 and 2: all, and the pair"


@pytest.mark.slow
def test_a_rank_that_hears_of_the_loss_before_its_step_does_not_leave_one_waiting_in_a_group_without_loss(
    whole: Ended, tmp_path: Path
) -> None:
    record = lose_rank_1("early", whole, tmp_path)
    assert record["groups_rebuilt"] == 1, "both halves, one of them on each rank"
    assert record["groups_kept"] == 0
    assert record["groups_lazy"] == 2
