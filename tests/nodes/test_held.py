"""Workers that SIGKILL does not end (tests/recovery/held.py): their node is given up, and no job waits for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import wait_until
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended

LIMIT_S = 240.0
SLACK = {"CHECKPOINTLESS_HANG_SLACK": "0.7"}


def finish(it: Nodes) -> Ended:
    """The end of all agents, while the worker is still held; then it is let go."""
    wait_until(lambda: not it.running(), f"the end of all\n{it.text}", LIMIT_S)
    assert it.left(), "the worker has ended by itself"
    (it.folder / "let-go").touch()
    return it.finish()


@pytest.mark.slow
def test_where_no_other_node_is_the_job_ends_with_the_reason(job: Callable[..., Nodes]) -> None:
    it = job("1", 3, "1:4:forward:held", env=SLACK)
    it.start(1)
    ended = finish(it)
    assert ended.code == 1
    assert "This node is not fit to run workers: the worker of rank 1, process " in ended.text
    assert "ChildFailedError" in ended.text


@pytest.mark.slow
def test_its_seat_goes_to_a_spare_and_the_job_ends_as_if_nothing_had_been(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 2, "2:5:backward:held", env=SLACK)
    it.start(3)
    ended = finish(it)
    assert sorted(map(str, it.codes)) == ["0", "0", "1"], ended.text
    (bad,) = (agent for agent in it.agents if agent.code)
    assert bad.says("does not end after SIGKILL"), ended.text
    check(Ended(ended.out, 4, 0, ended.text), 2, 3)


@pytest.mark.slow
def test_a_script_that_is_run_again_does_not_wait_for_it_either(job: Callable[..., Nodes]) -> None:
    """Rung 3: the others leave the script, and it does not."""
    faults = "1:0:load:held,2:0:load:hold,2:0:start:kill"
    it = job("1", 3, faults, env=SLACK, options=("--max-restarts", "1"))
    it.start(1)
    it.await_file("held")
    it.go("")
    ended = finish(it)
    assert ended.code == 1
    assert "This node is not fit to run workers: the worker of rank 1, process " in ended.text
