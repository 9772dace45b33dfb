"""A job with several groups: which of them a recovery rebuilds, keeps, and leaves to their next use."""

from __future__ import annotations

from pathlib import Path

from tests.recovery.launching import difference, launch

SCRIPT = Path(__file__).with_name("job_groups.py")


def test_groups_in_use_are_rebuilt_or_kept_and_others_are_connected_when_they_are_used_again(
    tmp_path: Path,
) -> None:
    whole = launch(tmp_path / "whole", ranks=4, script=SCRIPT)
    assert whole.code == 0, whole.text
    ended = launch(tmp_path / "lost", ranks=4, script=SCRIPT, DIE="yes")
    assert ended.code == 0, ended.text
    (record,) = ended.recoveries()
    assert (record["rung"], record["lost_ranks"]) == (1, [1]), ended.text
    assert record["groups_rebuilt"] == 1, "the half of rank 1"
    assert record["groups_kept"] == 1, "the other half"
    assert record["groups_lazy"] == 2, "on ranks 1 and 2: all, and the pair"
    finals = ended.finals()
    assert [final["values"] for final in finals] == [(9, value, 10.0) for value in (0.0, 7.5, 7.5, 0.0)]
    for rank, (mine, theirs) in enumerate(zip(finals, whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
