"""Jobs whose ranks are on several (pretended) nodes, each with a directory of its own, and lose one: no bit differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recovery.launching import JOB, Ended, difference, launch

HERE = Path(__file__).parent
RANKS = 4


def train(out: Path, faults: str = "", script: Path = JOB, nodes: str = "0,2", **env: str) -> Ended:
    launcher = (str(HERE / "pretending.py"),)
    return launch(out, faults, RANKS, script, launcher=launcher, NODES=nodes, **env)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault, on one node."""
    ended = launch(tmp_path_factory.mktemp("oracle"), ranks=RANKS)
    assert ended.code == 0, ended.text
    return ended


def check(ended: Ended, oracle: Ended, *lost: int) -> None:
    assert ended.code == 0, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), oracle.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
    found = ended.recoveries()
    assert {record["rung"] for record in found} == {1}, ended.text
    assert {rank for record in found for rank in record["lost_ranks"]} == set(lost), ended.text


def test_all_ranks_of_a_lost_node_get_their_state_over_the_network(oracle: Ended, tmp_path: Path) -> None:
    faults = "2:3:forward:kill,3:8:stepped:kill,2:15:outside:kill"
    check(train(tmp_path, faults, NODE_DIES="1"), oracle, 2, 3)


@pytest.mark.slow
def test_ranks_lost_on_two_nodes_get_their_state_from_the_nearest(oracle: Ended, tmp_path: Path) -> None:
    faults = "1:3:forward:kill,2:3:forward:kill,0:8:backward:kill,3:8:stepped:kill"
    check(train(tmp_path, faults), oracle, 0, 1, 2, 3)


@pytest.mark.slow
def test_several_lost_nodes_are_served_at_once(oracle: Ended, tmp_path: Path) -> None:
    faults = "1:3:forward:kill,2:3:forward:kill,3:3:forward:kill"
    check(train(tmp_path, faults, nodes="0,1,2"), oracle, 1, 2, 3)


@pytest.mark.parametrize(
    "dies",
    [
        "0:send",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("2:receive", "3:receive", "1:send,2:send")),
    ],
)
@pytest.mark.slow
def test_a_rank_lost_in_the_middle_of_a_transfer_holds_up_nobody(
    dies: str, oracle: Ended, tmp_path: Path
) -> None:
    script = HERE / "job_transfer.py"
    ended = train(tmp_path, "2:3:forward:kill", script, NODE_DIES="1", DIES=dies)
    check(ended, oracle, *{2, 3, *(int(death[0]) for death in dies.split(","))})
    assert {path.name for path in tmp_path.glob("died-*")} == {
        f"died-{death.replace(':', '-')}" for death in dies.split(",")
    }


@pytest.mark.parametrize("how", ["told", "untold"])
@pytest.mark.slow
def test_workers_meet_in_another_store_when_theirs_is_lost(how: str, oracle: Ended, tmp_path: Path) -> None:
    faults = "2:3:forward:kill,1:8:stepped:kill,3:15:outside:kill"
    check(train(tmp_path, faults, NODE_DIES="1", MOVES=how), oracle, 1, 2, 3)


@pytest.mark.slow
def test_shards_with_replicas_on_another_node_come_back_over_the_network(tmp_path: Path) -> None:
    script, kinds = HERE / "job_sharded.py", "accumulate,frozen"
    whole = launch(tmp_path / "whole", ranks=RANKS, script=script, KINDS=kinds)
    faults = "accumulate:2:2:forward,accumulate:3:4:between,frozen:2:2:backward"
    ended = train(tmp_path / "lost", faults, script, NODE_DIES="1", KINDS=kinds)
    check(ended, whole, 2, 3)
