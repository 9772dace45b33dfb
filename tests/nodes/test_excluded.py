"""A node that loses its workers again and again loses its seat to a spare, and the job goes on without a difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.nodes.cluster import Nodes


@pytest.mark.slow
def test_a_node_that_fails_again_and_again_is_excluded_and_a_spare_takes_its_place(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    faults = "1:3:forward:kill,1:4:between:holdspare,1:5:forward:kill"
    it = job("2:3", 1, faults, options=("--rdzv-conf", "node_faults=2"))
    it.start(2)
    it.await_file("1-3-forward-0")
    (spare,) = it.start(1)
    it.await_spare(spare)
    it.go("spare")
    ended = it.finish()
    check(ended, 1)
    assert it.codes == [0, 0, 0], ended.text
    cause = "was excluded, since 2 of its workers were lost within 100 steps"
    bad = next(agent for agent in it.agents if agent.says(f"ends its workers: its seat 1 {cause}"))
    assert bad not in (it.agents[0], spare)
    assert f"node 1 {cause}: rung 1, " in it.agents[0].text, ended.text
    assert ended.recoveries()[-1]["cause"] == cause
    assert it.agent_of(1) is spare
    assert len(ended.pids(0)) == 1
