"""etcd: lost connections, expired keys, logins and TLS, and errors that say what to do."""

from __future__ import annotations

import logging
import signal
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from pyetcd import etcdrpc as rpc
from torch.distributed.elastic.rendezvous import RendezvousParameters

from checkpointless_elastic.agent.directory import Leader, directory_opener
from checkpointless_elastic.agent.directory_etcd import EtcdDirectory, parse_endpoints, read_access
from checkpointless_elastic.agent.etcd_client import Access
from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import ConfigError, DirectoryError
from tests.conftest import wait_until
from tests.directory.etcd_server import Cluster, free_ports, require_login, write_certificates

PASSWORD = "open sesame"
QUICK = ["--heartbeat-interval", "50", "--election-timeout", "300"]

Starter = Callable[..., Cluster]


def leader(term: int, agent: str = "a") -> Leader:
    return Leader(term, agent, f"{agent}.example:29400")


def connect(cluster: Cluster, run_id: str = "job", limit: float = 5.0, **options: object) -> EtcdDirectory:
    return EtcdDirectory.open(cluster.endpoints, run_id, limit, timeout=20.0, **options)  # type: ignore[arg-type]


def stored(cluster: Cluster, run_id: str) -> list[Any]:
    """The keys of a job, with their leases."""
    prefix = f"/checkpointless/{run_id}/".encode()
    with grpc.insecure_channel(cluster.endpoints[0]) as channel:
        request = rpc.RangeRequest(key=prefix, range_end=prefix[:-1] + b"0", keys_only=True)
        return list(rpc.KVStub(channel).Range(request, timeout=5).kvs)


def test_claims_and_beats_go_on_when_the_leading_member_is_killed(own_etcd: Starter) -> None:
    cluster = own_etcd(members=3)
    with closing(connect(cluster)) as one, closing(connect(cluster)) as other:
        assert one.claim(leader(1))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(other.wait_newer, 1, 30)
            cluster.leader().kill()
            assert one.beat(1, 1)
            assert one.claim(leader(2, "b"))
            assert waiting.result(30) == leader(2, "b")
        assert not other.beat(1, 2)
        assert other.beat(2, 1)
        assert one.last_beat(2) == 1


def test_a_member_that_is_stopped_costs_no_more_than_a_part_of_the_limit(own_etcd: Starter) -> None:
    cluster = own_etcd(members=3, options=QUICK)
    with closing(connect(cluster)) as directory:
        assert directory.claim(leader(1))
        leading = cluster.leader()
        follower = next(member for member in cluster.members if member is not leading)
        follower.send(signal.SIGSTOP)
        assert all(directory.beat(1, count) for count in range(3))
        follower.send(signal.SIGCONT)


def test_without_most_of_its_members_etcd_fails_in_time(own_etcd: Starter) -> None:
    cluster = own_etcd(members=3, options=QUICK)
    with closing(connect(cluster, limit=1.0)) as directory:
        for member in cluster.members[1:]:
            member.kill()
        begun = time.monotonic()
        with pytest.raises(
            DirectoryError, match="did not answer within 1 s .*check that most of its members run"
        ):
            directory.claim(leader(1))
        assert time.monotonic() - begun < 1.5


def test_a_waiting_agent_misses_nothing_over_a_restart_and_a_compaction(own_etcd: Starter) -> None:
    cluster = own_etcd()
    (member,) = cluster.members
    with closing(connect(cluster)) as one, closing(connect(cluster, limit=20.0)) as other:
        assert one.claim(leader(1))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(other.wait_newer, 1, 60)
            member.kill()
            member.start()
            member.expect_answer()
            with grpc.insecure_channel(member.endpoint) as channel:
                revision = rpc.KVStub(channel).Range(rpc.RangeRequest(key=b"x"), timeout=20).header.revision
                rpc.KVStub(channel).Compact(
                    rpc.CompactionRequest(revision=revision, physical=True), timeout=20
                )
            assert one.claim(leader(2, "b"))
            assert waiting.result(30) == leader(2, "b")


def test_every_key_of_a_job_expires_with_one_lease_of_a_minute(etcd: Cluster) -> None:
    run_id = uuid.uuid4().hex
    with closing(connect(etcd, run_id)) as directory:
        assert directory.claim(leader(1))
        assert directory.beat(1, 1)
        directory.end("succeeded")
    found = stored(etcd, run_id)
    assert len(found) == 4
    (lease,) = {key.lease for key in found}
    with grpc.insecure_channel(etcd.endpoints[0]) as channel:
        left = rpc.LeaseStub(channel).LeaseTimeToLive(rpc.LeaseTimeToLiveRequest(ID=lease), timeout=5)
    assert (left.grantedTTL, left.TTL > 50) == (60, True)


def test_agents_that_all_paused_until_their_keys_expired_go_on_in_their_term(etcd: Cluster) -> None:
    with ExitStack() as stack:
        beats, claims = (uuid.uuid4().hex for _ in range(2))
        jobs = {
            job: [stack.enter_context(closing(connect(etcd, job, lease_s=1))) for _ in range(2)]
            for job in (beats, claims)
        }
        for one, other in jobs.values():
            assert one.claim(leader(1))
            assert one.claim(leader(2))
            assert other.newest() == leader(2)
        wait_until(lambda: not stored(etcd, beats) and not stored(etcd, claims), "the leases expire", 15)
        one, other = jobs[beats]
        assert one.beat(2, 7)
        assert other.last_beat(2) == 7
        one, other = jobs[claims]
        assert other.claim(leader(3, "b"))
        assert not one.beat(2, 7)


def test_agents_that_paused_never_follow_a_job_that_began_anew(etcd: Cluster) -> None:
    run_id = uuid.uuid4().hex
    with closing(connect(etcd, run_id, lease_s=1)) as one, closing(connect(etcd, run_id, lease_s=1)) as late:
        assert one.claim(leader(1))
        assert one.claim(leader(2))
        wait_until(lambda: not stored(etcd, run_id), "the lease expires", 15)
        assert late.claim(leader(1, "late"))
        with pytest.raises(DirectoryError, match="went back from term 2 .*end it and start it again"):
            one.beat(2, 1)


def test_tls_and_a_login_work_together_and_an_expired_login_is_renewed(
    own_etcd: Starter, tmp_path: Path
) -> None:
    files = write_certificates(tmp_path)
    options = ["--cert-file", files.server_cert, "--key-file", files.server_key, "--client-cert-auth"]
    options += ["--trusted-ca-file", files.ca, "--auth-token-ttl", "1"]
    cluster = own_etcd(scheme="https", options=[str(option) for option in options])
    certificates = [path.read_bytes() for path in (files.ca, files.key, files.cert)]
    with grpc.secure_channel(cluster.endpoints[0], grpc.ssl_channel_credentials(*certificates)) as channel:
        grpc.channel_ready_future(channel).result(20)
        require_login(channel, "trainer", PASSWORD)
    access = Access(str(files.ca), str(files.cert), str(files.key), "trainer", PASSWORD)
    with closing(connect(cluster, access=access)) as directory:
        assert directory.claim(leader(1))
        assert directory.wait_newer(1, 2.5) is None  # longer than a login lives
        assert directory.beat(1, 1)
    with pytest.raises(DirectoryError, match="did not answer within 1 s .*etcd_ca, etcd_cert and etcd_key"):
        EtcdDirectory.open(
            cluster.endpoints, "job", 1.0, timeout=1.0, access=Access(user="trainer", password=PASSWORD)
        )


@pytest.fixture
def guarded(own_etcd: Starter) -> Cluster:
    """An etcd that wants a login."""
    cluster = own_etcd()
    with grpc.insecure_channel(cluster.endpoints[0]) as channel:
        grpc.channel_ready_future(channel).result(20)
        require_login(channel, "trainer", PASSWORD)
    return cluster


def test_refusals_name_the_user_and_the_reason_but_no_password(
    guarded: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(
        DirectoryError, match="refuses user 'trainer' .*authentication failed.*check etcd_user"
    ) as wrong:
        connect(guarded, access=Access(user="trainer", password="a wrong one"))
    with pytest.raises(DirectoryError, match="refuses a client without a user .*user name is empty"):
        connect(guarded)
    assert "a wrong one" not in f"{wrong.value!r} {caplog.text} {Access(password='a wrong one')!r}"
    assert str(wrong.value).count("\n") == 0


def test_an_endpoint_where_nothing_listens_fails_in_time() -> None:
    (port,) = free_ports(1)
    begun = time.monotonic()
    with pytest.raises(
        DirectoryError, match=rf"etcd at 127.0.0.1:{port} did not answer within 1 s .*refused"
    ):
        EtcdDirectory.open([f"127.0.0.1:{port}"], "job", 1.0, timeout=1.0)
    assert time.monotonic() - begun < 1.5


def test_the_settings_of_a_job_open_it(etcd: Cluster) -> None:
    endpoint = ",".join([f"127.0.0.1:{free_ports(1)[0]}", *etcd.endpoints])
    params = RendezvousParameters("checkpointless-etcd", endpoint, uuid.uuid4().hex, 1, 1)
    with closing(directory_opener("checkpointless-etcd", params, Config())()) as directory:
        assert directory.newest() is None


def test_endpoints_have_etcds_port_unless_said() -> None:
    assert parse_endpoints("h1:1,h2, [::1]:3") == ["h1:1", "h2:2379", "[::1]:3"]


@pytest.mark.parametrize("given", ["", ",", "h1:port", "h1:1,h 2:1"])
def test_endpoints_that_cannot_be_read_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--rdzv-endpoint.*HOST:PORT\[,HOST:PORT"):
        parse_endpoints(given)


def test_a_password_comes_from_a_file_or_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from file\n")
    variable = {"CHECKPOINTLESS_ETCD_PASSWORD": "from variable"}
    config = Config(etcd_user="u", etcd_password_file=str(file))
    assert read_access(config, variable).password == "from file"
    assert read_access(Config(etcd_user="u"), variable).password == "from variable"
    with pytest.raises(
        ConfigError, match="needs a password: give etcd_password_file or set CHECKPOINTLESS_ETCD"
    ):
        read_access(Config(etcd_user="u"), {})
    file.unlink()
    with pytest.raises(ConfigError, match="etcd_password_file .* cannot be read"):
        read_access(config, {})


def test_a_file_for_tls_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="file /nowhere/ca.pem for TLS to etcd cannot be read"):
        EtcdDirectory.open(["127.0.0.1:1"], "job", 1.0, timeout=1.0, access=Access(ca="/nowhere/ca.pem"))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("directory_etcd", "etcd_client"):
        monkeypatch.delitem(sys.modules, f"checkpointless_elastic.agent.{module}")
    monkeypatch.setitem(sys.modules, "pyetcd", None)  # as an import finds it that is not installed
    params = RendezvousParameters("checkpointless-etcd", "127.0.0.1:1", "job", 1, 1)
    with pytest.raises(ConfigError, match=r"pip install checkpointless_elastic\[etcd\]"):
        directory_opener("checkpointless-etcd", params, Config())
