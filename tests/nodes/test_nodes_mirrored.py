"""Plain FSDP2 over several nodes: no other rank holds a shard, and a lost node's come back from its guardian's mirrors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tests.recovery.launching as single
from tests.conftest import wait_until
from tests.directory.etcd_server import Cluster
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended, difference

SCRIPT = Path(single.__file__).with_name("job_mirrors.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """The same job without a fault and without mirrors, on one node; each kind is run once."""
    known: dict[tuple[int, str], Ended] = {}

    def run(ranks: int, width: str) -> Ended:
        if (ranks, width) not in known:
            out = tmp_path_factory.mktemp("whole")
            known[ranks, width] = single.launch(out, ranks=ranks, script=SCRIPT, WIDTH=width)
            assert known[ranks, width].code == 0, known[ranks, width].text
        return known[ranks, width]

    return run


def mirrored(every: int, die: str, loses: str = "node", width: str = "24") -> dict[str, Any]:
    env = {"DIE": die, "LOSES": loses, "WIDTH": width}
    return {"script": SCRIPT, "options": ("--rdzv-conf", f"mirror_every={every}"), "env": env}


def check(it: Nodes, whole: Callable[..., Ended], ranks: int, *lost: int) -> list[dict[str, Any]]:
    """The end is that of the job without a fault, bit for bit, and rung 2 has brought these ranks back."""
    it.finish()
    assert sorted(filter(None, it.codes)) == [-9] * len([code for code in it.codes if code]), it.text
    ended = Ended(it.folder, ranks, 0, it.text)
    finals = zip(ended.finals(), whole(ranks, it.env["WIDTH"]).finals(), strict=True)
    for rank, (mine, theirs) in enumerate(finals):
        assert difference(mine, theirs, f"rank {rank}") == "", it.text
    found = ended.recoveries()
    assert {record["rung"] for record in found} == {2}, it.text
    assert set(lost) <= {rank for record in found for rank in record["lost_ranks"]}, it.text
    return found


@pytest.mark.parametrize(
    ("every", "die"),
    [
        (1, "2:backward:5"),
        pytest.param(1, "3:forward:3", marks=pytest.mark.slow),
        pytest.param(1, "2:update:4", marks=pytest.mark.slow),
        pytest.param(1, "3:after:6", marks=pytest.mark.slow),
        pytest.param(1, "2:outside:7", marks=pytest.mark.slow),
        pytest.param(3, "2:backward:4", marks=pytest.mark.slow),
        pytest.param(3, "3:forward:7", marks=pytest.mark.slow),
    ],
)
def test_shards_of_a_lost_node_come_back_on_the_spare(
    every: int, die: str, job: Callable[..., Nodes], whole: Callable[..., Ended]
) -> None:
    it = job("2:3", 2, **mirrored(every, die))
    it.start(3)
    check(it, whole, 4, 2, 3)
