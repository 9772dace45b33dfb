"""Connections between agents over TLS, with certificates of a job's own authority."""

from __future__ import annotations

import logging
import random
import socket
import ssl
from contextlib import closing
from pathlib import Path

import pytest
import trustme

from checkpointless_elastic.agent.channel import Channels
from checkpointless_elastic.agent.credentials import Tls
from checkpointless_elastic.agent.peers import Closed
from checkpointless_elastic.errors import ConfigError
from tests.agent.meeting import Agent, agents, answer, identity, raw
from tests.agent.test_handshake import mutated


class Authority:
    """Signs certificates, into files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self._folder = folder
        folder.mkdir()
        self._ca.cert_pem.write_to_path(str(folder / "ca.pem"))

    def tls(self, name: str, ca: str = "") -> Tls:
        made = self._ca.issue_cert(f"{name}.example", key_type=trustme.KeyType.ECDSA)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        made.private_key_pem.write_to_path(str(key))
        made.cert_chain_pems[0].write_to_path(str(cert))
        return Tls(ca or str(self._folder / "ca.pem"), str(cert), str(key))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "others")


def rejected(one: Agent, two: Agent) -> str:
    """One connects to two in vain; the reason that it gets."""
    how, reason = one.fate(two.address)
    assert how is Closed.REJECTED
    one.until(lambda: not two.peers._shaking)
    assert one.opened == two.opened == two.closed == []
    return reason


def incoming(caplog: pytest.LogCaptureFixture) -> str:
    """The only log line about an incoming connection."""
    found = [record.getMessage() for record in caplog.records if "connection from" in record.getMessage()]
    assert len(found) == 1
    return found[0]


def test_messages_of_all_sizes_arrive_whole_and_in_order(ours: Authority) -> None:
    with agents(identity(ours.tls("one")), identity(ours.tls("two"))) as (one, two):
        mine, theirs = one.meet(two)
        bodies = [random.Random(size).randbytes(size) for size in (1, 0, 70_000, 20_000_000, 16_384, 3)]
        for body in bodies:
            mine.send(body)
            theirs.send(body[::-1])
        one.until(lambda: len(one.taken) == len(two.taken) == len(bodies), 20.0)
        assert two.bodies() == bodies
        assert one.bodies() == [body[::-1] for body in bodies]
        theirs.send(b"last words")
        theirs.close("test")
        one.until(lambda: bool(one.closed))
        assert one.bodies()[-1] == b"last words"
        assert one.closed[0][1] is Closed.GONE


def test_a_connection_over_tls_still_needs_the_token(ours: Authority) -> None:
    with agents(identity(ours.tls("one"), token=b"guessed"), identity(ours.tls("two"))) as (one, two):
        assert "the job tokens differ" in rejected(one, two)


def test_a_certificate_of_another_authority_is_refused_on_both_sides(
    ours: Authority, others: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with agents(identity(others.tls("one")), identity(ours.tls("two"))) as (one, two):
        assert "its certificate is not accepted (" in rejected(one, two)
    assert "compare the TLS settings on both sides" in incoming(caplog)


def test_an_initiator_that_trusts_us_but_has_anothers_certificate_is_refused(
    ours: Authority, others: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    two = ours.tls("two")
    with agents(identity(others.tls("one", ca=two.ca)), identity(two)) as (one, two):
        assert "it ended the TLS handshake (tlsv1 alert unknown ca)" in rejected(one, two)
    assert "its certificate is not accepted (" in incoming(caplog)


def test_an_initiator_without_a_certificate_is_refused(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ours.tls("one")
    context = ssl.create_default_context(cafile=tls.ca)
    context.check_hostname = False
    bio_in, bio_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(bio_in, bio_out)
    with agents(identity(tls)) as (one,), raw(one) as connection:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        connection.sendall(bio_out.read())
        bio_in.write(answer(one, connection, 600))
        client.do_handshake()
        connection.sendall(bio_out.read())
        answer(one, connection)
        assert one.opened == []
    assert "TLS with it failed (peer did not return a certificate)" in incoming(caplog)


def test_a_plain_initiator_is_told_that_tls_is_required(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with agents(identity(), identity(ours.tls("two"))) as (one, two):
        assert "it refused this agent: this agent requires TLS" in rejected(one, two)
    assert "it speaks without TLS and this agent does not" in incoming(caplog)


def test_an_initiator_with_tls_is_told_that_the_other_side_has_none(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with agents(identity(ours.tls("one")), identity()) as (one, two):
        assert "it refused this agent: this agent speaks without TLS" in rejected(one, two)
    assert "it speaks TLS and this agent does not" in incoming(caplog)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "it speaks HTTP"),
        (b"\xff" * 40, "it sent bytes that are not of this protocol"),
    ],
    ids=["HTTP", "garbage"],
)
def test_what_is_not_even_tls_is_told_apart(
    ours: Authority, caplog: pytest.LogCaptureFixture, data: bytes, what: str
) -> None:
    with agents(identity(ours.tls("one"))) as (one,), raw(one) as connection:
        connection.sendall(data)
        answer(one, connection)
    assert what in incoming(caplog)


def test_a_peer_that_is_silent_in_the_tls_handshake_times_out(ours: Authority) -> None:
    with (
        agents(identity(ours.tls("one")), limit=0.2) as (one,),
        closing(socket.create_server(("127.0.0.1", 0))) as to,
    ):
        assert one.fate(f"127.0.0.1:{to.getsockname()[1]}")[0] is Closed.TIMEOUT


def test_endless_tls_handshake_bytes_are_cut_off(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with agents(identity(ours.tls("one"))) as (one,), raw(one) as connection:
        connection.sendall(b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + bytes(16379))
        for _ in range(6):
            if one.loop.run(lambda: bool(caplog.records), 0.0):
                break
            connection.sendall(b"\x16\x03\x03\x40\x00" + bytes(16384))
        answer(one, connection)
    assert incoming(caplog)


def test_broken_tls_handshakes_open_nothing(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    choose = random.Random(9)
    tls = ours.tls("one")
    contexts = ssl.create_default_context(cafile=tls.ca)
    with agents(identity(tls), identity(tls)) as (one, two):
        for _ in range(200):
            out = ssl.MemoryBIO()
            client = contexts.wrap_bio(ssl.MemoryBIO(), out, server_hostname="one.example")
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            with raw(one) as connection:
                connection.sendall(mutated(out.read(), choose))
                connection.shutdown(socket.SHUT_WR)
                answer(one, connection)
        assert one.opened == one.closed == []
        mine, _ = two.meet(one)
        assert mine.is_open


def test_versions_before_1_2_are_not_spoken(ours: Authority) -> None:
    channels = Channels(ours.tls("one"))
    assert channels._contexts is not None
    assert {context.minimum_version for context in channels._contexts.values()} == {ssl.TLSVersion.TLSv1_2}


def test_files_that_cannot_be_used_are_named(ours: Authority, others: Authority, tmp_path: Path) -> None:
    good, other = ours.tls("one"), others.tls("one")
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConfigError, match="nowhere.pem of tls_ca cannot be used .No such file"):
        Channels(Tls("nowhere.pem", good.cert, good.key))
    with pytest.raises(ConfigError, match="empty.pem of tls_ca cannot be used"):
        Channels(Tls(str(empty), good.cert, good.key))
    with pytest.raises(ConfigError, match="of tls_key cannot be used .key values mismatch"):
        Channels(Tls(good.ca, good.cert, other.key))
    with pytest.raises(ConfigError, match="of tls_key cannot be used"):
        Channels(Tls(good.ca, good.cert, str(tmp_path / "nowhere.key")))
