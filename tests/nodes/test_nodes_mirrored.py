"""Plain FSDP2 over several nodes: no other rank holds a shard, and those of a lost node come back from mirrors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tests.recovery.launching as single
from benchmarks.harness.hosts import Hosts, supported
from tests.conftest import wait_until
from tests.directory.etcd_server import Cluster
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended, difference

SCRIPT = Path(single.__file__).with_name("job_mirrors.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """The same job without a fault and without mirrors, on one node; each kind is run once."""
    known: dict[tuple[int, str], Ended] = {}

    def run(ranks: int, ballast: str) -> Ended:
        if (ranks, ballast) not in known:
            out = tmp_path_factory.mktemp("whole")
            known[ranks, ballast] = single.launch(out, ranks=ranks, script=SCRIPT, BALLAST=ballast)
            assert known[ranks, ballast].code == 0, known[ranks, ballast].text
        return known[ranks, ballast]

    return run


def mirrored(every: int, die: str, loses: str = "node", ballast: str = "0") -> dict[str, Any]:
    env = {"DIE": die, "LOSES": loses, "BALLAST": ballast}
    return {"script": SCRIPT, "options": ("--rdzv-conf", f"mirror_every={every}"), "env": env}


def check(it: Nodes, whole: Callable[..., Ended], ranks: int, *lost: int) -> list[dict[str, Any]]:
    """The end is that of the job without a fault, bit for bit, and rung 2 has brought these ranks back."""
    it.finish()
    assert sorted(filter(None, it.codes)) == [-9] * len([code for code in it.codes if code]), it.text
    ended = Ended(it.folder, ranks, 0, it.text)
    finals = zip(ended.finals(), whole(ranks, it.env["BALLAST"]).finals(), strict=True)
    for rank, (mine, theirs) in enumerate(finals):
        assert difference(mine, theirs, f"rank {rank}") == "", it.text
    found = ended.recoveries()
    assert {record["rung"] for record in found} == {2}, it.text
    assert set(lost) <= {rank for record in found for rank in record["lost_ranks"]}, it.text
    return found


def test_a_shard_of_a_lost_node_comes_back_on_the_spare(
    job: Callable[..., Nodes], whole: Callable[..., Ended]
) -> None:
    it = job("2:3", 1, **mirrored(1, "1:backward:5"))
    it.start(3)
    check(it, whole, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "die"),
    [
        (1, "2:backward:5"),
        (1, "3:forward:3,0:update:5"),
        (1, "2:update:4"),
        (1, "3:after:6"),
        (1, "2:outside:7"),
        (3, "2:backward:4"),
        (3, "3:forward:7"),
    ],
)
def test_all_shards_of_a_lost_node_come_back_on_the_spare(
    every: int, die: str, job: Callable[..., Nodes], whole: Callable[..., Ended], etcd: Cluster
) -> None:
    faults = die.count(",") + 1
    it = job(f"2:{2 + faults}", 2, endpoint=etcd.endpoints[0], **mirrored(every, die))
    it.start(2 + faults)
    check(it, whole, 4, *(int(fault[0]) for fault in die.split(",")))


@pytest.mark.slow
def test_with_a_mirror_of_the_step_in_flight_the_survivors_keep_their_processes(
    job: Callable[..., Nodes], whole: Callable[..., Ended]
) -> None:
    it = job("2:3", 1, **mirrored(1, "1:forward:5", "held"))
    it.start(3, LOGLEVEL="DEBUG")
    it.await_file("held-1")
    in_flight = 6  # five steps and an evaluation are committed
    wait_until(
        lambda: it.agent_of(0).says(f"[rank 1] its mirror of step {in_flight} is kept here"), "a mirror"
    )
    it.go("1")
    (record,) = check(it, whole, 2, 1)
    assert record["lost_ranks"] == [1]
    assert record["reason"] == f"rank 1 goes on from its mirror of step {in_flight}", it.text


@pytest.mark.slow
def test_a_mirror_that_was_being_sent_when_its_node_was_lost_is_not_used(
    job: Callable[..., Nodes], whole: Callable[..., Ended]
) -> None:
    it = job("2:3", 1, **mirrored(1, "1:forward:5", "torn", ballast="48"))
    it.start(3)
    found = check(it, whole, 2, 1)
    assert "so every rank goes on from its mirror of step" in found[-1]["reason"], it.text


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_shards_of_the_coordinators_node_come_back_on_the_spare(
    every: int, job: Callable[..., Nodes], whole: Callable[..., Ended], etcd: Cluster
) -> None:
    it = job("2:3", 2, endpoint=etcd.endpoints[0], **mirrored(every, "0:backward:5"))
    it.start(3)
    check(it, whole, 4, 0, 1)


@pytest.mark.slow
def test_a_guardian_that_is_lost_after_its_ward_has_left_its_mirrors_with_the_wards_successor(
    job: Callable[..., Nodes], whole: Callable[..., Ended], etcd: Cluster
) -> None:
    it = job("2:4", 1, endpoint=etcd.endpoints[0], **mirrored(1, "1:forward:4,0:after:5"))
    it.start(4)
    check(it, whole, 2, 0, 1)


@pytest.mark.slow
def test_a_node_that_is_switched_off_without_a_word_comes_back_from_its_mirrors(
    job: Callable[..., Nodes], whole: Callable[..., Ended]
) -> None:
    if reason := supported():
        pytest.skip(reason)
    with Hosts(3) as hosts:
        it = job("2:3", 1, hosts=hosts, **mirrored(3, "1:forward:5", "off"))
        it.start(3)
        it.await_file("1-forward-5")
        hosts[it.agents.index(it.agent_of(1))].kill()
        check(it, whole, 2, 1)
