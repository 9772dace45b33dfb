"""A job that loses a node goes on with fewer ranks, and with more when a node comes: with no bit lost, no sample twice.

What it is compared with is plain torch: so many ranks up to a step, then so many from there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.hosts import Hosts, supported
from tests.conftest import wait_until
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_resize.py")
SAMPLES = 200
SHRINKS = {"CHECKPOINTLESS_ON_LOSS": "shrink", "CHECKPOINTLESS_ACTIVE_NODES": "3"}

Phase = tuple[int, int, str]
"""Ranks, the step up to which they go (-1: the last), whose random states of the phase before they have."""


def plain(folder: Path, *phases: Phase, **env: str) -> list[dict[str, Any]]:
    """What plain torch ends with, by rank."""
    before = folder
    for number, (ranks, until, random) in enumerate(phases):
        out = folder / f"phase-{number}"
        more = {"PLAIN": str(before), "STEPS": str(until), "RNG": random, **env}
        ended = launch(out, ranks=ranks, script=SCRIPT, backend="c10d", **more)
        assert ended.code == 0, ended.text
        before = out
    return ended.finals()


def same(ended: Ended, expected: list[dict[str, Any]]) -> None:
    assert ended.code == 0, ended.text
    found = Ended(ended.out, len(expected), 0, ended.text).finals()
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text


def samples(out: Path) -> dict[int, list[int]]:
    """By epoch, the samples of committed steps, of all ranks.

    What follows the last call before a change is run again, so that step is noted by both numbers of ranks.
    """
    seen: dict[tuple[int, int], dict[int, list[int]]] = {}
    for path in sorted(out.glob("seen-*.log")):
        world = int(path.stem.split("-")[2])
        for line in path.read_text().splitlines():
            step, epoch, indices = line.split()
            of_step = seen.setdefault((int(epoch), int(step)), {})
            of_step.setdefault(world, []).extend(map(int, indices.split(",")))
    found: dict[int, list[int]] = {}
    for (epoch, _), by_world in seen.items():
        found.setdefault(epoch, []).extend(by_world[max(by_world)])
    return found


def resizes(ended: Ended) -> list[tuple[int, list[int], int]]:
    """Of each record: its rung, the number of ranks before and after, and the step."""
    return [(record["rung"], record["resize"], record["step"]) for record in ended.recoveries()]


@pytest.mark.slow
def test_a_job_that_loses_a_node_goes_on_with_the_others_as_if_the_rest_had_been_dealt_to_them(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    it = job("1:3", 1, script=SCRIPT, env={**SHRINKS, "KILL": "1:5"})
    it.start(3)
    ended = it.finish()
    same(ended, plain(tmp_path / "plain", (3, 5, ""), (2, -1, "0,2")))
    assert resizes(ended) == [(3, [3, 2], 5)], ended.text
    (record,) = ended.recoveries()
    assert record["lost_ranks"] == [1] and "goes on with 2 of 3 nodes" in record["reason"]
    assert "went from 3 to 2 ranks" in it.agents[0].text


def test_no_sample_comes_twice_and_none_is_left_out_when_a_job_shrinks(job: Callable[..., Nodes]) -> None:
    it = job("1:3", 1, script=SCRIPT, env={**SHRINKS, "KILL": "2:5"})
    it.start(3)
    ended = it.finish()
    assert ended.code == 0, ended.text
    first, second = samples(it.folder)[0], samples(it.folder)[1]
    # 5 steps of 3 ranks use 60 samples, 140 are left for 2 ranks; in the second pass 2 ranks share 200: no padding
    assert sorted(first) == sorted(second) == list(range(SAMPLES)), ended.text


@pytest.mark.slow
def test_a_job_that_has_shrunk_grows_back_when_a_node_comes(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    it = job("1:3", 2, script=SCRIPT, env={**SHRINKS, "KILL": "2:5", "HOLD": "0:12"})
    it.start(3)
    it.await_file("did-HOLD-0-12")
    it.start(1)
    wait_until(lambda: it.agents[0].says("a node has come"), f"it grows {it.text}")
    it.go("0-12")
    ended = it.finish()
    assert resizes(ended) == [(3, [6, 4], 5), (3, [4, 6], 12)], ended.text
    phases: list[Phase] = [(6, 5, ""), (4, 12, "0,1,4,5"), (6, -1, "0,1,2,3,0,0")]
    same(ended, plain(tmp_path / "plain", *phases))


@pytest.mark.slow
def test_a_worker_lost_before_the_first_step_with_fewer_ranks_costs_no_state(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    faults = {"KILL": "1:5", "DIE": "1:2"}
    it = job("1:3", 1, script=SCRIPT, options=("--max-restarts=1",), env={**SHRINKS, **faults})
    it.start(3)
    ended = it.finish()
    same(ended, plain(tmp_path / "plain", (3, 5, ""), (2, -1, "0,2")))
    assert [record["resize"] for record in ended.recoveries()] == [[3, 2]], ended.text


@pytest.mark.slow
def test_a_node_that_was_cut_off_comes_back_to_a_job_that_has_shrunk(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    if reason := supported():
        pytest.skip(reason)
    with Hosts(3) as hosts:
        it = job("1:3", 1, script=SCRIPT, env={**SHRINKS, "HOLD": "1:5,0:8"}, hosts=hosts)
        it.start(3)
        it.await_file("did-HOLD-1-5")
        cut = it.agent_of(1)
        hosts[it.agents.index(cut)].cut()
        it.await_file("did-HOLD-0-8")
        hosts[it.agents.index(cut)].heal()
        wait_until(lambda: it.agents[0].says("a node has come"), f"it grows {it.text}")
        it.go("0-8")
        ended = it.finish()
    assert resizes(ended) == [(3, [3, 2], 5), (3, [2, 3], 8)], ended.text
    same(ended, plain(tmp_path / "plain", (3, 5, ""), (2, 8, "0,2"), (3, -1, "0,1,0")))


@pytest.mark.slow
def test_a_job_on_shards_goes_on_with_the_replicas_that_are_whole(
    job: Callable[..., Nodes], tmp_path: Path
) -> None:
    it = job("1:3", 2, script=SCRIPT, env={**SHRINKS, "KILL": "3:5", "HSDP": "1"})
    it.start(3)
    ended = it.finish()
    assert resizes(ended) == [(3, [6, 4], 5)], ended.text
    same(ended, plain(tmp_path / "plain", (6, 5, ""), (4, -1, "0,1,4,5"), HSDP="1"))
