"""Agents that stand still for longer than others wait for them, and come back: they change nothing any more."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.conftest import wait_until
from tests.directory.etcd_server import Cluster
from tests.nodes.cluster import Nodes


@pytest.mark.slow
def test_an_agent_that_was_stopped_finds_its_seat_given_away_and_becomes_a_spare(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 1, "1:5:forward:stop,0:8:start:hold")
    it.start(3)
    it.await_file("1-5-forward-0")
    stopped = it.agent_of(1)
    it.await_file("0-8-start-0")
    old = set(it.workers_of(stopped))
    os.kill(stopped.pid, signal.SIGCONT)
    wait_until(lambda: stopped.says("waits as a spare"), f"it becomes a spare {it.text}")
    wait_until(lambda: not old & {process.pid for process in it.processes()}, "its workers end")
    it.go("")
    ended = it.finish()
    check(ended, 1)
    assert it.codes == [0, 0, 0]
    assert stopped.says("gives up its seat and ends its workers"), ended.text


@pytest.mark.slow
def test_a_coordinator_that_was_stopped_steps_down_and_becomes_a_spare(
    job: Callable[..., Nodes], check: Callable[..., None], etcd: Cluster
) -> None:
    it = job("2:3", 1, "0:5:forward:stop,1:8:start:hold", endpoint=etcd.endpoints[0])
    it.start(3)
    it.await_file("1-8-start-0")
    stopped = it.agents[0]
    os.kill(stopped.pid, signal.SIGCONT)
    wait_until(lambda: stopped.says("waits as a spare"), f"it becomes a spare {it.text}")
    it.go("")
    check(it.finish(), 0)
    assert it.codes == [0, 0, 0]


@pytest.mark.slow
def test_a_coordinator_of_the_embedded_store_that_was_stopped_goes_on_or_ends_clearly(
    job: Callable[..., Nodes],
) -> None:
    it = job("2:3", 1, "0:5:forward:stop")
    it.start(3)
    it.await_file("0-5-forward-0")
    wait_until(lambda: len(it.running()) == 1, "the others end")
    os.kill(it.agents[0].pid, signal.SIGCONT)
    it.await_end()
    assert all(code == 1 for code in it.codes), it.text


def test_another_agent_coordinates_when_the_coordinators_node_is_lost(
    job: Callable[..., Nodes], check: Callable[..., None], etcd: Cluster
) -> None:
    it = job("2:3", 1, "0:5:forward:node", endpoint=etcd.endpoints[0])
    it.start(3)
    ended = it.finish()
    check(ended, 0)
    assert it.codes == [-9, 0, 0]


@pytest.mark.slow
def test_the_loss_of_the_coordinator_with_the_embedded_store_ends_the_job_with_a_clear_error(
    job: Callable[..., Nodes],
) -> None:
    it = job("2:3", 1, "0:5:forward:node")
    it.start(3)
    ended = it.finish()
    assert it.codes == [-9, 1, 1], ended.text
    for agent in it.agents[1:]:
        assert "No coordinator can be reached, and neither can the store" in agent.text, ended.text
