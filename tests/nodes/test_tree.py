"""Agents that hang in a tree: a worker below an inner node is lost, then an inner node itself."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest

from checkpointless_elastic.command.cli import main
from tests.conftest import wait_until
from tests.nodes.cluster import Nodes

HOLDS = "0:4:start:holdfirst,0:9:start:holdsecond,0:14:start:holdthird"


def parents(it: Nodes) -> dict[int, int]:
    """By seat that does not hang on the coordinator, the one it hangs on."""
    options = ["--rdzv-endpoint", f"127.0.0.1:{it.port}", "--rdzv-id", it.mark, "--json"]
    with redirect_stdout(io.StringIO()) as out:
        assert main(["status", *options]) == 0, it.text
    seats = json.loads(out.getvalue())["seats"]
    return {seat["seat"]: seat["parent"] for seat in seats if "parent" in seat}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fan_out", "seats", "tree", "below", "inner"),
    [(1, 4, {2: 1, 3: 2}, 3, 2), (2, 6, {4: 1, 5: 1}, 5, 1)],
    ids=["a chain", "two children each"],
)
def test_a_job_whose_orders_and_votes_go_through_a_tree_survives_losses_in_it(
    job: Callable[..., Nodes],
    check: Callable[..., None],
    fan_out: int,
    seats: int,
    tree: dict[int, int],
    below: int,
    inner: int,
) -> None:
    """The coordinator sends what all get to none of these seats, and hears votes from none: see `roster`, `branch`."""
    faults = f"{HOLDS},{below}:6:forward:kill,{inner}:11:forward:node"
    env = {"CHECKPOINTLESS_FAN_OUT": str(fan_out), "CHECKPOINTLESS_HEARTBEAT_MISSES": "10"}
    it = job(f"{seats}:{seats + 1}", 1, faults, env=env)
    it.start(seats + 1)
    for step, name in ((4, "first"), (9, "second"), (14, "third")):
        it.await_file(f"0-{step}-start-0")
        wait_until(lambda: parents(it) == tree, f"the tree stands at step {step}")
        it.go(name)
    ended = it.finish()
    check(ended, below, inner)
    assert sorted(code or 0 for code in it.codes) == [-9] + [0] * seats
