"""What is left of a recovery when the script has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import launch


@pytest.mark.slow
def test_no_thread_is_left_when_the_interpreter_shuts_down(tmp_path: Path) -> None:
    ended = launch(tmp_path, ranks=2, script=Path(__file__).with_name("job_ending.py"))
    assert ended.code == 0, ended.text
    (record,) = ended.recoveries()
    assert record["groups_lazy"] > 0, ended.text
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == ["", ""]
