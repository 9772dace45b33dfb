"""Jobs of several nodes: schedules of their faults, options of the commands, and a node that comes back."""

from __future__ import annotations

from pathlib import Path

import chaos
import cluster_demo
import pytest
import recovery_time
from harness import hosts
from harness.cluster import Cluster, coordinator_of
from harness.job import OURS, TORCHRUN, Job, Plan
from harness.node_faults import NodeFaults
from harness.schedule import schedule, steps_needed, with_nodes
from harness.weights import folder_differences
from jobs.faults import CLOCK, NODE_KINDS, Fault, write_schedule

REASON = hosts.supported()
CHAOS_JOB = Path(__file__).parents[2] / "benchmarks" / "jobs" / "chaos_job.py"


@pytest.mark.parametrize("seed", range(10))
def test_faults_of_nodes_are_mixed_with_those_of_workers(seed: int) -> None:
    steps = steps_needed(30)
    faults = with_nodes(schedule(22, seed, 6, steps), 8, seed, steps)
    assert sorted(fault.number for fault in faults) == list(range(30))
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    nodes = [fault for fault in faults if fault.kind in NODE_KINDS]
    assert {fault.kind for fault in nodes} == set(NODE_KINDS)
    assert len(nodes) == 8
    assert all(0 <= fault.step <= steps - 20 and fault.moment == CLOCK for fault in nodes)


def test_the_coordinator_is_the_agent_of_the_highest_term() -> None:
    line = "INFO [term {}] this agent coordinates the job\n"
    assert coordinator_of(["", ""]) is None
    assert coordinator_of([line.format(1), "", line.format(2)]) == 2
    assert coordinator_of([line.format(1) + line.format(10), "", line.format(9)]) == 0


def test_several_nodes_bring_a_spare_two_ranks_each_and_faults_of_their_own() -> None:
    (options,) = chaos.parse(["--nodes", "3", "--faults", "30"]).runs
    assert (options.ranks, options.spares, options.node_faults) == (6, 1, 7)
    (options,) = chaos.parse([]).runs
    assert (options.ranks, options.spares, options.node_faults) == (4, 0, 0)
    (options,) = chaos.parse(["--nodes", "2", "--store", "etcd"]).runs
    calm, struck = chaos.plans(options, Path("folder"), steps=10)
    assert (calm.nodes, calm.spares) == (1, 0)
    assert (struck.nodes, struck.spares, struck.ranks, struck.store) == (2, 1, 4, "etcd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-faults", "2"], "need --nodes 2"),
        (["--nodes", "3", "--spares", "0"], "and a spare"),
        (["--nodes", "1,2", "--layout", "hsdp", "--ranks", "3"], "hsdp takes a multiple of 2"),
        (["--nodes", "1,2", "--layout", "ddp,hsdp", "--faults", "3"], "4 runs need as many faults"),
        (["--nodes", "3", "--ranks", "4"], "multiple"),
        (["--nodes", "3", "--kinds", "stopped-agent"], "among --node-faults"),
    ],
)
def test_chaos_refuses_what_several_nodes_cannot_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        chaos.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "goes with --fault node"),
        (["--fault", "node"], "needs --nodes 2"),
        (["--fault", "node", "--nodes", "3"], "multiple of the 3 nodes"),
        (["--fault", "node", "--nodes", "2", "--layout", "ddp,hsdp"], "one layout"),
    ],
)
def test_recovery_time_refuses_what_a_lost_node_cannot_be_measured_with(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recovery_time.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_demo_shows_the_loss_of_the_coordinator_with_etcd() -> None:
    options = cluster_demo.parse([])
    assert cluster_demo.stories(options) == [("node", "c10d"), ("coordinator", "etcd"), ("partition", "c10d")]
    assert options.ranks == 6
    options = cluster_demo.parse(["--fault", "node", "--store", "etcd"])
    assert cluster_demo.stories(options) == [("node", "etcd")]


class Alone(Cluster):
    """One node, whose store is lost with it: the job starts over."""

    def holds_store(self, node: object) -> bool:
        return False


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.slow
def test_a_node_whose_agent_is_killed_or_whose_power_is_lost_comes_back_with_a_fresh_agent(
    tmp_path: Path,
) -> None:
    calm, struck = (Plan(backend, CHAOS_JOB, tmp_path / backend, 2, 20) for backend in (TORCHRUN, OURS))
    with Job(calm) as job:
        job.finish(120)
    kinds = ("paused agent", "killed agent", "power off")
    faults = [Fault(number, kind, CLOCK, 4, (), "node") for number, kind in enumerate(kinds)]
    write_schedule(struck.folder, faults)
    with Alone(struck) as cluster:
        nodes = NodeFaults(cluster, faults, seed=0, patience=0.5)
        nodes.start()
        nodes.join(200)
        assert nodes.error is None
        assert cluster.nodes[0].starts == 3
        assert len(list(tmp_path.glob(f"{OURS}/faults/?-?"))) == 6
        cluster.finish(200)
    assert folder_differences(calm.folder, struck.folder, 2) == []
