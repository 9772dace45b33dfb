"""Real torchruns lose workers and nodes: the others stay, and no bit differs from a run without the fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.conftest import wait_until
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended


@pytest.mark.slow
def test_a_worker_lost_on_another_node_than_the_coordinators_is_replaced_there(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2", 2, "3:5:forward:kill")
    it.start(2)
    ended = it.finish()
    check(ended, 3)
    assert [len(ended.pids(rank)) for rank in range(4)] == [1, 1, 1, 2]


def test_the_ranks_of_a_lost_node_move_to_a_spare_and_all_others_stay(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 2, "2:5:backward:node")
    it.start(3)
    ended = it.finish()
    check(ended, 2, 3)
    assert [len(ended.pids(rank)) for rank in range(4)] == [1, 1, 2, 2]
    assert sorted(it.codes) == [-9, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["freeze", "spin", "block"])
def test_a_worker_that_hangs_on_another_node_than_the_coordinators_is_found_and_replaced_there(
    kind: str, job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2", 2, f"3:8:forward:{kind}")
    it.start(2, CHECKPOINTLESS_HANG_SLACK="0.7")
    ended = it.finish()
    check(ended, 3)
    assert [len(ended.pids(rank)) for rank in range(4)] == [1, 1, 1, 2]
    (record,) = ended.recoveries()
    assert record["cause"].startswith("was stuck for"), record


@pytest.mark.parametrize("moment", ["between", "outside", "evaluate", "save", "passed"])
@pytest.mark.slow
def test_a_node_lost_between_steps_is_replaced_too(
    moment: str, job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    step = {"evaluate": 12, "save": 12, "passed": 24}.get(moment, 8)
    it = job("2:3", 1, f"1:{step}:{moment}:node")
    it.start(3)
    check(it.finish(), 1)


@pytest.mark.slow
def test_a_node_lost_during_the_recovery_of_another(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("3:5", 1, "1:5:forward:node,1:0:setup:node2")
    it.start(5)
    ended = it.finish()
    check(ended, 1, 2)
    assert len(ended.pids(0)) == 1


@pytest.mark.slow
def test_a_spare_lost_while_it_takes_the_seat_leaves_it_to_another(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:4", 1, "1:5:forward:node,1:0:setup:node")
    it.start(4)
    check(it.finish(), 1)
    assert sorted(it.codes) == [-9, -9, 0, 0]


@pytest.mark.slow
def test_two_nodes_are_lost_one_after_the_other(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("3:5", 1, "1:5:forward:node,2:14:stepped:node")
    it.start(5)
    check(it.finish(), 1, 2)


@pytest.mark.slow
def test_a_node_and_its_guardian_lost_at_once_lead_to_a_restart(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("3:5", 1, "1:5:forward:node2,1:5:backward:node", options=("--max-restarts=1",))
    it.start(5)
    ended = it.finish()
    check(ended, 1, 2, rung=3)
    assert "its private state was lost with its node and its guardian's" in ended.text


@pytest.mark.slow
def test_a_node_that_comes_later_takes_a_seat_for_which_there_was_no_spare(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 1, "1:5:forward:node")
    it.start(2)
    it.await_file("1-5-forward-0")
    it.start(1)
    check(it.finish(), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "seconds"),
    [("ON_LOSS=fail", 0), pytest.param("ON_LOSS_TIMEOUT=1", 1, marks=pytest.mark.slow)],
    ids=["at once", "in time"],
)
def test_a_lost_node_for_which_none_comes_ends_the_job(
    setting: str, seconds: int, job: Callable[..., Nodes]
) -> None:
    name, _, value = f"CHECKPOINTLESS_{setting}".partition("=")
    it = job("2", 1, "1:5:forward:node", env={name: value})
    it.start(2)
    ended = it.finish()
    assert sorted(map(int, filter(None, it.codes))) == [-9, 1], ended.text
    reason = f"no node has come for the lost node 1 within {seconds} s"
    assert f"No worker of this node has failed. The job stopped: {reason}" in it.agents[0].text, ended.text


@pytest.mark.slow
def test_workers_of_a_node_that_is_asked_to_end_move_to_a_spare(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 1, "1:5:forward:term,0:6:start:hold")
    it.start(3)
    it.await_file("1-5-forward-0")
    asked = it.agent_of(1)
    it.await_file("0-6-start-0")
    wait_until(lambda: asked.code is not None, f"it ends {it.text}")
    it.go("")
    ended = it.finish()
    assert sorted(map(str, it.codes)) == ["0", "0", "1"]
    check(Ended(ended.out, ended.ranks, 0, ended.text), 1)


@pytest.mark.slow
def test_ctrl_c_on_all_nodes_ends_all(job: Callable[..., Nodes]) -> None:
    it = job("2:3", 1, "0:5:forward:hold")
    it.start(3)
    it.await_file("0-5-forward-0")
    for agent in it.agents:
        os.killpg(agent.pid, signal.SIGINT)
    it.await_end()
    assert all(it.codes), it.text
