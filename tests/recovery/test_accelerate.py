"""A loop of Hugging Face Accelerate that loses a rank is, bit for bit, as one that loses none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import difference, launch

SCRIPT = Path(__file__).with_name("job_accelerate.py")


@pytest.mark.parametrize(
    ("loader", "die"),
    [
        (
            "",
            "3,5,9",
        ),  # between two updates, at the end of a pass, with which an update comes early, in the next pass
        pytest.param("processes", "2,5,12", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_changes_no_bit(loader: str, die: str, tmp_path: Path) -> None:
    whole = launch(tmp_path / "whole", ranks=2, script=SCRIPT, backend="c10d", LOADER=loader)
    assert whole.code == 0, whole.text
    ended = launch(tmp_path / "lost", ranks=2, script=SCRIPT, LOADER=loader, DIE=die)
    assert ended.code == 0, ended.text
    assert [record["rung"] for record in ended.recoveries()] == [1] * len(die.split(",")), ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


def test_an_accelerator_that_accumulates_must_be_named(tmp_path: Path) -> None:
    ended = launch(tmp_path, ranks=1, script=SCRIPT, UNNAMED="1")
    assert ended.code != 0
    assert "name the Accelerator in the Run, as in Run(..., accelerator=accelerator)" in ended.text
