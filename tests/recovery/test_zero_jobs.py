"""DDP with ZeroRedundancyOptimizer: a rank's optimizer state comes back from mirrors, or from its replicas if it has
some, and no bit differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_zero.py")


def check(folder: Path, kind: str, every: int, faults: tuple[str, ...], ranks: int) -> Ended:
    """The job with faults and without; each rank of each fault must have died."""
    whole = launch(folder / "whole", ranks=ranks, script=SCRIPT, KINDS=kind)
    assert whole.code == 0, whole.text
    planned = [f"{kind}:{fault}" for fault in faults]
    options = ("--rdzv-conf", f"mirror_every={every}", "--max-restarts=0")
    ended = launch(folder / "lost", ",".join(planned), ranks, SCRIPT, options, KINDS=kind)
    assert ended.code == 0, ended.text
    died = {path.name for path in ended.out.glob("died-*")}
    assert died == {f"died-{fault.replace(':', '-')}" for fault in planned}, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
    return ended


@pytest.mark.parametrize(
    ("kind", "every", "faults"),
    [
        ("whole", 1, ("1:2:forward", "0:2:updating", "1:3:updated", "0:4:between")),
        pytest.param("views", 1, ("0:2:backward", "1:3:stepped", "0:3:consolidated"), marks=pytest.mark.slow),
        pytest.param("views", 1, ("0:3:updated", "1:3:updated", "1:4:updated"), marks=pytest.mark.slow),
        pytest.param("whole", 2, ("0:3:forward", "1:4:updated"), marks=pytest.mark.slow),
    ],
)
def test_a_lost_part_comes_back_from_its_mirror(
    kind: str, every: int, faults: tuple[str, ...], tmp_path: Path
) -> None:
    ended = check(tmp_path, kind, every, faults, ranks=2)
    assert {record["rung"] for record in ended.recoveries()} == {2}, ended.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_parts_of_half_of_the_ranks_come_back_from_the_other_half(kind: str, tmp_path: Path) -> None:
    faults = ("1:2:forward", "2:2:updated", "3:3:updated", "0:3:consolidated", "2:4:stepped")
    ended = check(tmp_path, kind, 0, faults, ranks=4)
    assert {record["rung"] for record in ended.recoveries()} == {1}, ended.text
    assert "no other rank holds" not in ended.text


@pytest.mark.slow
def test_without_mirrors_the_first_step_warns(tmp_path: Path) -> None:
    ended = launch(tmp_path, ranks=2, script=SCRIPT, KINDS="whole")
    assert ended.code == 0, ended.text
    assert "2 of 2 ranks hold state that no other rank holds (0, 1)" in ended.text
