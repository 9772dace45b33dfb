"""A store that takes its time while a node is lost, here one that stands still: survivors wait for its answer.

Without that their failed collectives are the script's own errors, all of them leave, and nobody has the state any more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.directory.etcd_server import Cluster
from tests.nodes.cluster import Nodes

PAIRS = Path(__file__).with_name("job_pairs.py")
PAUSE_S = 3.0
"""Longer than a rank whose collective has failed waits for news of a lost rank, if it knows of no reason to wait."""


@contextmanager
def standing(etcd: Cluster) -> Iterator[None]:
    """Strike inside: the store goes on PAUSE_S later."""
    etcd.members[0].send(signal.SIGSTOP)
    try:
        yield
        time.sleep(PAUSE_S)
    finally:
        etcd.members[0].send(signal.SIGCONT)


@pytest.mark.parametrize(
    ("lost", "number"),
    [
        pytest.param(0, signal.SIGKILL, id="coordinator"),
        pytest.param(0, signal.SIGTERM, id="coordinator leaves"),
        pytest.param(1, signal.SIGKILL, id="follower"),
        pytest.param(1, signal.SIGTERM, id="follower leaves", marks=pytest.mark.slow),
    ],
)
def test_survivors_of_a_lost_node_wait(
    job: Callable[..., Nodes], check: Callable[..., None], etcd: Cluster, lost: int, number: signal.Signals
) -> None:
    it = job("3:4", 1, f"{lost}:5:forward:hold", endpoint=etcd.endpoints[0])
    it.start(4)
    it.await_file(f"{lost}-5-forward-0")
    gone = it.agent_of(lost)
    with standing(etcd):
        os.kill(gone.pid, number)
    ended = it.finish()
    assert [agent.code for agent in it.agents if agent is not gone] == [0, 0, 0], ended.text
    check(replace(ended, code=0), lost)  # whoever is asked to leave says 1


@pytest.mark.slow
def test_a_coordinator_that_stood_still_itself_tells_of_a_loss_before_it_is_certain_of_its_term(
    job: Callable[..., Nodes], check: Callable[..., None], etcd: Cluster
) -> None:
    it = job("3:4", 1, "1:5:forward:hold", endpoint=etcd.endpoints[0])
    it.start(4)
    it.await_file("1-5-forward-0")
    gone, coordinator = it.agent_of(1), it.agents[0]
    os.kill(coordinator.pid, signal.SIGSTOP)
    with standing(etcd):
        time.sleep(1.4)  # more than half of the time after which it is taken for lost
        os.kill(coordinator.pid, signal.SIGCONT)
        time.sleep(0.3)
        os.kill(gone.pid, signal.SIGKILL)
    check(it.finish(), 1)


@pytest.mark.slow
def test_a_group_that_the_first_loss_leaves_whole_waits_for_the_second_one(
    job: Callable[..., Nodes], etcd: Cluster
) -> None:
    it = job("2:3", 2, "1:kill,2:pairs", script=PAIRS, endpoint=etcd.endpoints[0])
    it.start(3)
    for name in ("1:kill", "2:pairs", "there-0"):
        it.await_file(name)
    time.sleep(0.5)  # rank 0 waits for rank 2
    it.go("1")
    time.sleep(1.0)  # the recovery of rank 1 waits for rank 2
    with standing(etcd):
        os.kill(it.agent_of(2).pid, signal.SIGKILL)
    it.await_end()
    assert sorted(map(str, it.codes)) == ["-9", "0", "0"], it.text


@pytest.mark.slow
def test_what_fails_after_all_have_finished_fails_at_once(job: Callable[..., Nodes], etcd: Cluster) -> None:
    it = job("2:2", 1, "0:end", script=PAIRS, endpoint=etcd.endpoints[0], env={"LATE": "1"})
    it.start(2)
    it.await_file("trained-1")
    it.await_file("0:end")
    time.sleep(1.0)  # rank 1 has finished, and waits
    with standing(etcd):
        os.kill(it.agent_of(1).pid, signal.SIGKILL)
        time.sleep(0.5)
        it.go("0")
    it.await_file("late-0")
    it.await_end()
