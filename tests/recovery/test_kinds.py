"""Ways to train other than the plain loop, each with a lost rank, compared with a run without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_kinds.py")
LIKE_OTHERS = (
    ("closure", "backward"),
    ("drawn", "stepped"),
    ("gan", "between"),
    ("gan", "late"),
    ("parts", "between"),
    ("scaler", "backward"),
    ("accumulate", "forward"),
    ("several", "between"),
    ("several", "stepped"),
    ("several", "finished"),
    ("own", "stepped"),
    ("unused", "forward"),
    ("static", "backward"),
    ("manual", "forward"),
    ("iterable", "stepped"),
)


@pytest.fixture(scope="module")
def wholes() -> dict[str, Ended]:
    """Runs without a fault, by kind."""
    return {}


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("inner", "forward"),
        ("several", "gathered"),
        ("compiled", "forward"),
        ("passing", "forward"),
        ("zerofirst", "start"),
        ("outside", "start"),
        ("average", "start"),
        ("dealt", "forward"),
        ("drawn", "forward"),
        ("apart", "start"),
        ("apart", "forward"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in LIKE_OTHERS),
    ],
)
def test_a_lost_rank_changes_no_bit(kind: str, moment: str, wholes: dict[str, Ended], tmp_path: Path) -> None:
    ranks = 3 if kind == "zerofirst" else 2
    whole = wholes.get(kind) or launch(tmp_path / "whole", ranks=ranks, script=SCRIPT, KIND=kind)
    assert whole.code == 0, whole.text
    wholes[kind] = whole
    ended = launch(tmp_path / "lost", ranks=ranks, script=SCRIPT, KIND=kind, DIE=moment)
    assert ended.code == 0, ended.text
    assert [record["rung"] for record in ended.recoveries()] == [1], ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
