"""Real torchruns in which a bit of a rank's state changes: it is found, and the rank replaced from the majority."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_verify.py")


def run(folder: Path, flips: str, every: int, ranks: int = 3, **env: str) -> Ended:
    return launch(
        folder, ranks=ranks, script=SCRIPT, FLIPS=flips, CHECKPOINTLESS_VERIFY_EVERY=str(every), **env
    )


def lost(ended: Ended) -> list[tuple[int, int]]:
    """(rank, step) of each recovery; all by rung 1, for other bytes than the replicas'."""
    found = []
    for record in ended.recoveries():
        (rank,) = record["lost_ranks"]
        assert record["rung"] == 1, ended.text
        assert record["cause"].startswith("has other bytes than its replicas in "), ended.text
        assert record["causes"] == {str(rank): record["cause"]}
        found.append((rank, record["step"]))
    return found


def replicas_differ(ended: Ended, shards: int = 1) -> str:
    """Where the state of a rank is not that of the first one that holds the same."""
    assert ended.code == 0, ended.text
    finals: list[dict[str, Any]] = [{key: one[key] for key in ("state", "moments")} for one in ended.finals()]
    found = (difference(one, finals[rank % shards], f"rank {rank}") for rank, one in enumerate(finals))
    return next(filter(None, found), "")


def test_a_flipped_bit_is_found_before_the_next_commit_and_its_rank_replaced(tmp_path: Path) -> None:
    ended = run(tmp_path, "1:4:weight", every=2)
    assert lost(ended) == [(1, 4)], ended.text
    assert replicas_differ(ended) == ""
    cause = "has other bytes than its replicas in model.module.0.weight at step 4"
    assert f"[generation 0, step 4] Replicas differ: rank 1 {cause}, and is replaced." in ended.text


@pytest.mark.slow
def test_flips_at_the_steps_that_are_compared_change_no_bit_of_the_result(tmp_path: Path) -> None:
    calm = run(tmp_path / "calm", "", every=1)
    assert calm.recoveries() == []
    ended = run(tmp_path / "flips", "0:1:weight,1:3:moment,2:3:weight,2:7:moment", every=1)
    found = [rank for record in ended.recoveries() for rank in record["lost_ranks"]]
    assert sorted(found) in ([0, 1, 2, 2], [0, 2]), ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), calm.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


@pytest.mark.slow
def test_a_flip_between_two_comparisons_has_spoilt_gradients_but_replicas_end_equal(tmp_path: Path) -> None:
    ended = run(tmp_path, "0:3:moment,2:5:weight", every=2)
    assert lost(ended) == [(0, 4), (2, 6)], ended.text
    assert replicas_differ(ended) == ""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weight", "moment"])
def test_a_rank_that_is_lost_before_the_next_comparison_gets_nothing_of_what_has_changed(
    tmp_path: Path, what: str
) -> None:
    calm = run(tmp_path / "calm", "", every=0, ranks=4)
    ended = run(tmp_path / "flip", f"1:3:{what},2:3:kill", every=100, ranks=4)
    assert ended.code == 0, ended.text
    (record,) = ended.recoveries()
    assert (record["lost_ranks"], record["rung"], record["step"]) == ([1, 2], 1, 3), ended.text
    assert record["causes"]["1"].startswith("has other bytes than its replicas in "), ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), calm.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


@pytest.mark.slow
def test_where_two_sources_differ_the_script_is_run_again(tmp_path: Path) -> None:
    ended = launch(
        tmp_path,
        script=SCRIPT,
        options=("--max-restarts=1",),
        FLIPS="1:3:weight,2:3:kill",
        CHECKPOINTLESS_VERIFY_EVERY="100",
    )
    assert replicas_differ(ended) == ""
    (record,) = ended.recoveries()
    assert record["rung"] == 3, ended.text
    assert "hold different bytes of model.module.0.weight at step 3, and nobody knows" in record["reason"]


@pytest.mark.slow
def test_of_two_that_differ_nobody_is_replaced(tmp_path: Path) -> None:
    ended = run(tmp_path, "1:4:weight", every=2, ranks=2)
    assert ended.recoveries() == []
    assert replicas_differ(ended) == "rank 1.state.module.0.weight: tensors differ"
    assert (
        "ranks 0 and 1 hold different bytes of model.module.0.weight at step 4, and nobody knows"
        in ended.text
    )


@pytest.mark.slow
def test_a_flipped_bit_of_one_of_three_replicas_of_a_shard(tmp_path: Path) -> None:
    ended = run(tmp_path, "3:4:weight", every=2, ranks=6, LAYOUT="hsdp")
    assert lost(ended) == [(3, 4)], ended.text
    assert replicas_differ(ended, shards=2) == ""
