"""Nodes whose memory or health is bad: their ranks are replaced where they are, or move to a spare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.nodes.cluster import LIMIT_S, Nodes
from tests.recovery.launching import Ended, difference

REASON = "says: the fan has stopped"
VERIFY = Path(__file__).parents[1] / "recovery" / "job_verify.py"


def finish(it: Nodes) -> Ended:
    """The end of all, of which the unfit one ends first."""
    wait_until(lambda: not it.running(), "the end of all", LIMIT_S)
    return it.finish()


@pytest.mark.slow
def test_a_flipped_bit_on_another_node_than_the_coordinators_is_found_and_its_rank_replaced_there(
    job: Callable[..., Nodes],
) -> None:
    it = job("3", 1, script=VERIFY, env={"FLIPS": "2:4:weight", "CHECKPOINTLESS_VERIFY_EVERY": "2"})
    it.start(3)
    ended = it.finish()
    assert ended.code == 0, ended.text
    (record,) = ended.recoveries()
    assert record["lost_ranks"] == [2] and record["rung"] == 1
    assert record["cause"] == "has other bytes than its replicas in model.module.0.weight at step 4"
    first, *others = [final["state"] for final in map(ended._final, range(3))]
    assert [difference(first, other) for other in others] == ["", ""]


@pytest.mark.slow
def test_the_seat_of_a_node_that_is_not_fit_any_more_goes_to_a_spare(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 2, "2:5:backward:kill")
    command = 'test ! -e "$OUT/2-5-backward-0" || { echo the fan has stopped; exit 1; }'
    it.start(2, CHECKPOINTLESS_HEALTH_CHECK=command)
    it.await_file("2-5-backward-0")
    it.start(1)
    ended = finish(it)
    assert sorted(map(str, it.codes)) == ["0", "0", "1"], ended.text
    (bad,) = (agent for agent in it.agents if agent.code)
    assert bad.says("This node is not fit to run workers: the health check") and bad.says(REASON), ended.text
    check(Ended(ended.out, 4, 0, ended.text), 2, 3)
    (record,) = ended.recoveries()
    assert REASON in record["causes"]["3"], ended.text


@pytest.mark.slow
def test_a_spare_that_is_not_fit_leaves_and_the_next_one_takes_the_seat(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:4", 1, "0:2:start:hold,1:5:forward:node")
    it.start(2)
    it.await_file("0-2-start-0")
    command = 'test ! -e "$OUT/1-5-forward-0" || { echo the fan has stopped; exit 1; }'
    for check_of in (command, "true"):
        (spare,) = it.start(1, CHECKPOINTLESS_HEALTH_CHECK=check_of)
        it.await_spare(spare)
    it.go("")
    ended = finish(it)
    assert it.codes[2:] == [1, 0], ended.text
    assert it.agents[2].says(REASON), ended.text
    check(Ended(ended.out, 2, 0, ended.text), 1)
