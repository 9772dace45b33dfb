"""Jobs on several nodes, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.directory.etcd_server import Cluster, has_etcd, skip_without_etcd, start_etcd
from tests.nodes.cluster import Nodes
from tests.recovery.launching import Ended, difference, launch


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    """Makes jobs (see Nodes); fails the test when one leaves a process or a directory behind."""
    made: list[Nodes] = []

    def make(nodes: str, workers: int = 1, faults: str = "", **more: Any) -> Nodes:
        made.append(Nodes(tmp_path / f"job-{len(made)}", nodes, workers, faults, **more))
        return made[-1]

    yield make
    try:
        for one in made:
            assert not one.running(), f"The test ends while agents run.\n{one.text}"
            wait_until(lambda one=one: not one.left(), "nothing is left behind")  # type: ignore[misc]
    finally:
        left = [what for one in made for what in one.left()]
        for one in made:
            one.kill()
    assert not left


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Cluster]:
    """One etcd of the test's own."""
    if not has_etcd():
        skip_without_etcd()
    cluster = start_etcd(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ended]:
    """The same job without a fault, on one node with that many ranks; each number is run once."""
    known: dict[int, Ended] = {}

    def run(ranks: int) -> Ended:
        if ranks not in known:
            known[ranks] = launch(tmp_path_factory.mktemp("calm"), ranks=ranks)
            assert known[ranks].code == 0, known[ranks].text
        return known[ranks]

    return run


@pytest.fixture
def check(calm: Callable[[int], Ended]) -> Callable[..., None]:
    """Checks that a job has ended as the calm one bit for bit, with these ranks lost, each time by this rung."""

    def compare(ended: Ended, *lost: int, rung: int = 1) -> None:
        assert ended.code == 0, ended.text
        for rank, (mine, theirs) in enumerate(zip(ended.finals(), calm(ended.ranks).finals(), strict=True)):
            assert difference(mine, theirs, f"rank {rank}") == "", ended.text
        found = ended.recoveries()
        assert {rank for record in found for rank in record["lost_ranks"]} == set(lost), ended.text
        assert {record["rung"] for record in found} <= {rung}, ended.text

    return compare
