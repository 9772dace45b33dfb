"""HSDP with the shards of a replica on one node and the replicas on several: a node's shards come from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tests.recovery.launching as single
from tests.nodes.cluster import Nodes
from tests.recovery.launching import difference

SCRIPT = Path(single.__file__).with_name("job_sharded.py")


@pytest.mark.slow
def test_a_lost_replica_of_a_sharded_model_comes_back_on_the_spare(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    kinds = {"KINDS": "accumulate,recompute"}
    whole = single.launch(tmp_path / "whole", ranks=4, script=SCRIPT, **kinds)
    assert whole.code == 0, whole.text
    fault = "accumulate:2:3:evaluated"
    it = job("2:3", 2, fault, script=SCRIPT, env={**kinds, "LOSES": "node"})
    it.start(3)
    it.finish()
    ended = single.Ended(
        it.folder, 4, max(code for code in it.codes if code is not None and code >= 0), it.text
    )
    assert ended.code == 0, ended.text
    assert (it.folder / f"died-{fault.replace(':', '-')}").exists()
    assert [(record["rung"], record["lost_ranks"]) for record in ended.recoveries()] == [(1, [2, 3])]
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
