"""Private state that is larger than any message outlives its node too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_large.py")


@pytest.mark.slow
def test_a_rank_that_has_accumulated_gradients_over_several_calls_goes_on_with_them_on_the_spare(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    calm = launch(tmp_path / "calm", ranks=2, script=SCRIPT)
    assert calm.code == 0, calm.text
    it = job("2:3", 1, script=SCRIPT, env={"DIE": "1"})
    it.start(3)
    it.finish()
    assert sorted(it.codes) == [-9, 0, 0], it.text
    ended = Ended(it.folder, 2, 0, it.text)
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), calm.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", it.text
    assert [(record["rung"], record["lost_ranks"]) for record in ended.recoveries()] == [(1, [1])], it.text
