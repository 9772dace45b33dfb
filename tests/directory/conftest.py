"""A directory of each kind, as every agent of one job would open it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from checkpointless_elastic.agent.directory import Directory
from checkpointless_elastic.agent.directory_etcd import EtcdDirectory
from checkpointless_elastic.agent.directory_tcp import TcpDirectory
from tests.directory.etcd_server import Cluster, has_etcd, skip_without_etcd, start_etcd

LIMIT_S = 5.0

Opener = Callable[[], Directory]


@pytest.fixture(scope="session", autouse=True)
def _shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster | None]:
    """Begun before the first test, which else would seem to leave it behind."""
    cluster = start_etcd(tmp_path_factory.mktemp("etcd")) if has_etcd() else None
    yield cluster
    if cluster is not None:
        cluster.stop()


@pytest.fixture
def etcd(_shared_etcd: Cluster | None) -> Cluster:
    """One etcd for all tests that do not harm it."""
    return _shared_etcd or skip_without_etcd()


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts etcd for a test that harms it; takes the options of `start_etcd`."""
    with ExitStack() as stack:
        if not has_etcd():
            skip_without_etcd()

        def start(members: int = 1, scheme: str = "http", options: list[str] | None = None) -> Cluster:
            cluster = start_etcd(tmp_path, members, scheme, options)
            stack.callback(cluster.stop)
            return cluster

        yield start


@pytest.fixture(params=["tcp", "etcd"])
def open_one(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens the directory of one job as one more agent."""
    run_id = uuid.uuid4().hex
    with ExitStack() as stack:
        if request.param == "tcp":
            host = TcpDirectory.open("localhost", 0, run_id, LIMIT_S, timeout=LIMIT_S)
            stack.enter_context(closing(host))
            port = int(host.endpoint.rsplit(":", 1)[1])

            def make() -> Directory:
                return TcpDirectory.open("localhost", port, run_id, LIMIT_S, timeout=LIMIT_S)
        else:
            endpoints = request.getfixturevalue("etcd").endpoints

            def make() -> Directory:
                return EtcdDirectory.open(endpoints, run_id, LIMIT_S, timeout=LIMIT_S)

        yield lambda: stack.enter_context(closing(make()))
