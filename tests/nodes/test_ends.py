"""How jobs on several nodes begin and end: restarts, bugs of the script, and agents that do not belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.directory.etcd_server import Cluster
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended

PLAIN = Path(__file__).with_name("job_plain.py")


def results(it: Nodes) -> list[str]:
    return [path.read_text() for path in sorted(it.folder.glob("result-*"))]


@pytest.mark.slow
def test_a_script_without_a_run_is_restarted_on_the_spare(job: Callable[..., Nodes]) -> None:
    it = job("2:3", 1, "1:4:node", script=PLAIN, options=("--max-restarts=1",))
    it.start(3)
    ended = it.finish()
    assert ended.code == 0, ended.text
    assert results(it) == ["run 1: 30", "run 1: 30"]
    assert [record["rung"] for record in ended.recoveries()] == [3]
    assert ended.recoveries()[0]["lost_ranks"] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["node", "kill"])
def test_without_a_restart_left_the_job_ends_on_every_node(kind: str, job: Callable[..., Nodes]) -> None:
    it = job("2:3", 1, f"1:4:{kind}", script=PLAIN)
    it.start(3)
    ended = it.finish()
    for agent in it.agents:
        assert agent.code in ((1, -9) if kind == "node" else (1,)), ended.text
        if agent.code == 1:
            assert "ChildFailedError" in agent.text, ended.text
            assert "no restart is left (--max-restarts is 0)" in agent.text, ended.text
    assert results(it) == []


@pytest.mark.slow
def test_a_bug_of_the_script_ends_all_agents_and_one_shows_it(job: Callable[..., Nodes]) -> None:
    it = job("2:3", 1, "1:5:forward:always")
    it.start(3)
    ended = it.finish()
    assert it.codes == [1, 1, 1], ended.text
    guilty = it.agent_of(1)
    assert "Boom: always" in guilty.text, ended.text
    assert "train_step" in guilty.text, ended.text
    for agent in it.agents:
        assert ("No worker of this node has failed." in agent.text) is (agent is not guilty), ended.text
        assert "failed twice at step" in agent.text, ended.text


@pytest.mark.slow
def test_too_few_agents_end_with_the_number_that_came(job: Callable[..., Nodes]) -> None:
    it = job("3", 1, options=("--rdzv-conf", "timeout=2"))
    it.start(2)
    ended = it.finish()
    assert it.codes == [1, 1], ended.text
    assert all("2 of 3 nodes came within 2 s" in agent.text for agent in it.agents), ended.text


@pytest.mark.slow
def test_agents_that_do_not_belong_are_refused_and_change_nothing(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2", 1, "0:5:forward:hold", env={"CHECKPOINTLESS_JOB_TOKEN": "the token of this very job"})
    it.start(2)
    it.await_file("0-5-forward-0")
    (stranger,) = it.start(1, CHECKPOINTLESS_JOB_TOKEN="the token of another one")
    (third,) = it.start(1)
    wait_until(lambda: stranger.code is not None and third.code is not None, f"they end {it.text}")
    it.go("")
    ended = it.finish()
    assert it.codes == [0, 0, 1, 1], ended.text
    assert "does not accept this agent" in stranger.text, ended.text
    assert "turned this agent away: the job has its 2 nodes" in third.text, ended.text
    check(Ended(ended.out, ended.ranks, 0, ended.text))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "1:5:forward:always"])
def test_an_agent_that_comes_after_the_end_says_how_the_job_ended(
    fault: str, job: Callable[..., Nodes], etcd: Cluster
) -> None:
    it = job("2:3", 1, fault, endpoint=etcd.endpoints[0])
    it.start(2)
    it.finish()
    (late,) = it.start(1)
    it.await_end()
    assert late.code == 1
    assert f"The job has {'failed' if fault else 'succeeded'}" in late.text, it.text
