"""A node that is cut off from the others, and reachable again while the job goes on without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.harness.hosts import Hosts, supported
from tests.conftest import wait_until
from tests.nodes.cluster import Nodes


@pytest.mark.slow
def test_a_node_that_was_cut_off_finds_its_seat_given_away_and_becomes_a_spare(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    if reason := supported():
        pytest.skip(reason)
    with Hosts(3) as hosts:
        it = job("2:3", 1, "1:5:forward:holdcut,0:8:start:hold", hosts=hosts)
        it.start(3)
        it.await_file("1-5-forward-0")
        cut = it.agent_of(1)
        workers = it.workers_of(cut)
        hosts[it.agents.index(cut)].cut()
        it.go("cut")
        it.await_file("0-8-start-0")
        hosts[it.agents.index(cut)].heal()
        wait_until(lambda: cut.says("waits as a spare"), f"it becomes a spare {it.text}")

        wait_until(lambda: not set(workers) & {process.pid for process in it.processes()}, "its workers end")
        it.go("")
        check(it.finish(), 1)
        assert it.codes == [0, 0, 0]
