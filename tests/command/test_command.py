"""`checkpointless status` and `drain` against real jobs of several nodes on loopback."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command.nodes import Nodes, expect_equal
from tests.directory.etcd_server import free_ports, has_etcd, skip_without_etcd, start_etcd


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    """The same job on two nodes, left in peace."""
    (port,) = free_ports(1)
    with Nodes(tmp_path_factory.mktemp("oracle"), "checkpointless", f"localhost:{port}", "2") as job:
        job.hurry()
        job.start()
        job.start()
        assert job.codes(0, 1) == [0, 0], job.logs()
    return job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes and a spare; the first one hosts the store."""
    (port,) = free_ports(1)
    with Nodes(tmp_path, "checkpointless", f"localhost:{port}") as job:
        for _ in range(3):
            job.start()
        job.expect_step(2)
        yield job


def test_a_drained_node_leaves_with_code_0_and_no_bit_differs(job: Nodes, oracle: Nodes) -> None:
    seen = job.status()
    assert (seen["state"], seen["world"], seen["restarts"], seen["exposed"]) == ("running", 2, 0, "")
    assert [(seat["seat"], seat["ranks"], seat["host"]) for seat in seen["seats"]] == [
        (0, [0], "127.0.0.1"),
        (1, [1], "127.0.0.1"),
    ]
    assert seen["seats"][0]["agent"] == seen["coordinator"]
    (spare,) = seen["spares"]
    seats = {job.number(seat["agent"]): seat["seat"] for seat in seen["seats"]}
    hosting = seats[store := job.store_host()]  # its agent is there before the others
    refused = job.command("drain", str(hosting))
    assert (refused.code, refused.out) == (1, "")
    assert "store lives in agent" in refused.err

    goes = seen["seats"][1 - hosting]
    done = job.command("drain", goes["agent"])
    assert done.code == 0, done.err + job.logs()
    assert (
        f"Seat {1 - hosting} (rank {1 - hosting}) has moved from {goes['agent']} to {spare['agent']}"
        in done.out
    )
    assert job.codes(job.number(goes["agent"])) == [0], job.logs()
    after = job.status()
    assert after["seats"][1 - hosting]["agent"] == spare["agent"]
    assert (after["spares"], after["generation"] > seen["generation"]) == ([], True)
    job.go_on()
    refused = job.command("drain", spare["agent"])
    assert refused.code == 1
    assert "no spare waits that runs 1 workers" in refused.err

    job.hurry()
    assert job.codes(store, job.number(spare["agent"])) == [0, 0], job.logs()
    expect_equal(job, oracle)
    assert job.causes() == ["was drained"]
    assert len({pid for pid, _ in job.steps(hosting)}) == 1  # the survivor kept its process


@pytest.mark.slow
def test_a_coordinator_is_drained_and_stays_then_a_node_is_terminated(job: Nodes, oracle: Nodes) -> None:
    seen = job.status()
    done = job.command("drain", "--keep", "0", "--json")
    assert done.code == 0, done.err + job.logs()
    after = job.status()
    assert after["coordinator"] == seen["coordinator"] == after["spares"][0]["agent"]
    assert after["seats"][0]["agent"] == seen["spares"][0]["agent"]
    job.go_on()
    store = job.store_host()
    with_seats = [job.number(seat["agent"]) for seat in after["seats"]]
    stopped = next(number for number in with_seats if number != store)
    job.launchers[stopped].send_signal(signal.SIGTERM)
    assert job.codes(stopped) != [0]
    job.go_on()
    job.hurry()
    assert job.codes(*{0, 1, 2} - {stopped}) == [0, 0], job.logs()
    expect_equal(job, oracle)
    assert job.causes() == ["was drained", "was drained (SIGTERM)"]


def test_what_cannot_be_done_is_refused_with_a_sentence(job: Nodes) -> None:
    wrong = job.command("status", token="another token than that of the job")
    assert wrong.code == 1
    assert "the job tokens differ" in wrong.err
    for node, sentence in (
        ("no-such-host", "No agent has 'no-such-host'"),
        ("7", "There is no seat 7"),
        ("127.0.0.1", "is part of 3 agents' names"),
        ("", "No agent has ''"),
    ):
        done = job.command("drain", node)
        assert (done.code, sentence in done.err) == (1, True), done.err
    shown = job.command("status")
    assert shown.out.startswith("Job job: running, generation 0, step "), shown.err
    assert shown.out.count("\n") == 6
    job.options[-1] = "another"
    other = job.command("status", "--timeout", "1")
    assert "No agent coordinates a job of this --rdzv-id" in other.err


@pytest.mark.slow
def test_a_coordinator_that_is_drained_hands_over(tmp_path: Path, oracle: Nodes) -> None:
    if not has_etcd():
        skip_without_etcd()
    etcd = start_etcd(tmp_path)
    try:
        with Nodes(tmp_path, "checkpointless-etcd", ",".join(etcd.endpoints)) as job:
            for _ in range(3):
                job.start()
            job.expect_step(2)
            seen = job.status()
            done = job.command("drain", "0")
            assert done.code == 0, done.err + job.logs()
            gone = job.number(seen["coordinator"])
            assert job.codes(gone) == [0], job.logs()
            after = job.status()
            assert (after["term"], after["coordinator"] != seen["coordinator"]) == (seen["term"] + 1, True)
            job.hurry()
            assert job.codes(*{0, 1, 2} - {gone}) == [0, 0], job.logs()
            expect_equal(job, oracle)
            assert job.causes() == ["was drained"]
            ended = job.command("status", "--json")
            assert ended.out == '{"job": "job", "verdict": "succeeded"}\n'
    finally:
        etcd.stop()


def test_a_job_of_one_node_cannot_be_asked() -> None:
    line = [sys.executable, "-m", "checkpointless_elastic", "status"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "A job of one node (--nnodes 1) has no network" in done.stderr
