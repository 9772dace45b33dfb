"""Who is refused on a real port, with which log line, and what it may cost."""

from __future__ import annotations

import gc
import logging
import os
import random
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest

from checkpointless_elastic.agent.handshake import MAGIC, MAX_HANDSHAKE, Handshake, Role
from checkpointless_elastic.agent.peers import Closed, Peer
from checkpointless_elastic.agent.stream import Stream
from checkpointless_elastic.protocol.messages import VERSION
from tests.agent.meeting import Agent, agents, answer, identity, raw
from tests.agent.test_handshake import HEADER, mutated, packed


@pytest.fixture
def agent() -> Iterator[Agent]:
    with agents(None) as (one,):
        yield one


def serves(agent: Agent) -> None:
    """A good peer is still served."""
    opened = len(agent.opened)
    other = Agent(agent.loop)
    peer = other.peers.connect(agent.address)
    peer.send(b"still there?")
    agent.until(lambda: bool(agent.taken))
    assert agent.bodies() == [b"still there?"]
    assert len(agent.opened) == opened + 1
    other.peers.close()
    agent.until(lambda: bool(agent.closed))
    agent.opened.clear()
    agent.taken.clear()
    agent.closed.clear()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n", "it speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it sent text that is not of this protocol (b'SSH-2.0-OpenSSH_')"),
        (random.Random(1).randbytes(5000), "it sent bytes that are not of this protocol"),
        (HEADER.pack(MAGIC, VERSION + 1, 40), f"it speaks version {VERSION + 1}"),
        (HEADER.pack(MAGIC, VERSION, 1 << 31), f"at most {MAX_HANDSHAKE} are allowed"),
        (packed("Greeting", b"other", "someone", b"n" * 32), "it belongs to another job than 'job'"),
    ],
    ids=["HTTP", "text", "garbage", "version", "length", "job"],
)
def test_what_is_no_peer_is_refused_at_once_with_one_line(
    agent: Agent, caplog: pytest.LogCaptureFixture, data: bytes, what: str
) -> None:
    with raw(agent) as connection:
        where = f"127.0.0.1:{connection.getsockname()[1]}"
        connection.sendall(data if VERSION + 1 != data[8] else data + bytes(40))
        answer(agent, connection)
    (line,) = lines(caplog)
    assert line.startswith(f"The connection from {where} is closed: not accepted: ")
    assert what in line
    assert agent.opened == agent.closed == []
    serves(agent)


def test_a_wrong_token_is_told_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    with agents(None, identity(token=b"another token")) as (one, two):
        how, reason = two.fate(one.address)
        assert (how, reason) == (
            Closed.REJECTED,
            "not accepted: it refused this agent: the job tokens differ",
        )
        assert one.fate(two.address)[0] is Closed.REJECTED
        assert one.opened == two.opened == []
    assert sum("it does not know this job's token" in line for line in lines(caplog)) == 2
    assert sum("it refused this agent: the job tokens differ" in line for line in lines(caplog)) == 2
    assert "another token" not in caplog.text


def test_an_acceptor_without_the_token_is_not_accepted(agent: Agent) -> None:
    """It takes everybody and proves nothing."""
    rogue = Handshake(identity(token=b"guessed"), Role.ACCEPTOR)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = agent.peers.connect(f"127.0.0.1:{listener.getsockname()[1]}")
        agent.until(lambda: peer._stream is not None)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(rogue.feed(connection.recv(4096)))
            agent.until(lambda: bool(readable(connection)))
            connection.recv(4096)
            connection.sendall(packed("Proof", rogue._mac(Role.ACCEPTOR)))
            agent.until(lambda: bool(agent.closed))
    assert agent.closed[0][1:] == (Closed.REJECTED, "not accepted: it does not know this job's token")
    assert agent.opened == []


def readable(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def test_a_server_of_another_kind_is_not_accepted(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = agent.peers.connect(f"127.0.0.1:{listener.getsockname()[1]}")
        agent.until(lambda: peer._stream is not None)
        connection, _ = listener.accept()
        connection.sendall(b"220 mail.example ESMTP\r\n")
        agent.until(lambda: bool(agent.closed))
        connection.close()
    assert agent.closed[0][1] is Closed.REJECTED
    assert "b'220 mail.example'" in agent.closed[0][2]


def test_bytes_sent_back_are_not_accepted(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = agent.peers.connect(f"127.0.0.1:{listener.getsockname()[1]}")
        agent.until(lambda: peer._stream is not None)
        connection, _ = listener.accept()
        connection.sendall(connection.recv(4096))
        agent.until(lambda: bool(agent.closed))
        connection.close()
    assert agent.closed[0][1:] == (Closed.REJECTED, "not accepted: it sent a Greeting out of turn")


def test_a_recorded_connection_is_of_no_use_again(agent: Agent) -> None:
    initiator = Handshake(identity(), Role.INITIATOR)
    record = [initiator.start()]
    with raw(agent) as connection:
        connection.sendall(record[0])
        challenge = answer(agent, connection, HEADER.size + 1)
        record.append(initiator.feed(challenge))
        connection.sendall(record[1])
        agent.until(lambda: bool(agent.opened))
    agent.until(lambda: bool(agent.closed))
    with raw(agent) as connection:
        connection.sendall(record[0])
        answer(agent, connection, HEADER.size + 1)
        connection.sendall(record[1])
        assert b"the job tokens differ" in answer(agent, connection)
    assert len(agent.opened) == 1


@pytest.mark.parametrize("cut", [0, 5, 20])
def test_a_peer_that_stops_in_the_middle_of_its_greeting_is_dropped_after_the_limit(
    caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    with agents(None, limit=0.2) as (one,), raw(one) as connection:
        connection.sendall(Handshake(identity(), Role.INITIATOR).start()[:cut])
        answer(one, connection)
        assert one.opened == one.closed == []
    assert "timed out: no handshake within 0.2 s" in lines(caplog)[0]


def test_a_truncated_handshake_changes_nothing(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    with raw(agent) as connection:
        connection.sendall(Handshake(identity(), Role.INITIATOR).start()[:30])
        connection.shutdown(socket.SHUT_WR)
        answer(agent, connection)
    assert "closed by the peer during the handshake" in lines(caplog)[0]
    serves(agent)


def test_a_look_at_the_port_is_no_warning(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with raw(agent) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer(agent, connection)
    assert lines(caplog) == []
    assert "went away without a word" in caplog.text


def test_many_idle_connections_do_not_keep_a_peer_out(caplog: pytest.LogCaptureFixture) -> None:
    with agents(None, max_handshakes=8) as (one,), ExitStack() as stack:
        idle = [stack.enter_context(raw(one)) for _ in range(40)]
        serves(one)
        assert len(one.peers._shaking) <= 8
        assert readable_end(idle[0])
    assert "8 newer connections are in handshake" in caplog.text
    assert "more connections were not accepted in the last 10 s" in lines(caplog)[-1]
    assert len(lines(caplog)) == 11


def readable_end(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_running_out_of_descriptors_is_survived(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.enter_context(raw(agent))
        spare = os.open("/dev/null", os.O_RDONLY)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        try:
            agent.until(lambda: "No connection can be accepted for now" in caplog.text)
            assert agent.peers.connect("127.0.0.1:9").how is None
            agent.until(lambda: bool(agent.closed))
            assert agent.closed.pop()[1] is Closed.TIMEOUT
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        serves(agent)


# ---- fuzz ------------------------------


def insider(agent: Agent, choose: random.Random) -> bytes:
    """Somebody who knows the token begins a handshake; a changed proof."""
    initiator = Handshake(identity(), Role.INITIATOR)
    with raw(agent) as connection:
        connection.sendall(initiator.start())
        proof = initiator.feed(answer(agent, connection, HEADER.size + 1))
        sent = mutated(proof, choose)
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer(agent, connection)
    return sent if sent == proof else b""


def outsiders(agent: Agent, choose: random.Random, count: int) -> None:
    """That many connections at once that send changed greetings or noise, in pieces, and go away."""
    connections = []
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(raw(agent))
            good = Handshake(identity(), Role.INITIATOR).start()
            data = (
                mutated(good, choose) if choose.random() < 0.7 else choose.randbytes(choose.randrange(3000))
            )
            cut = choose.randrange(len(data) + 1)
            connection.sendall(data[:cut])
            if choose.random() < 0.3:
                agent.loop.run(lambda: False, 0.0)
            connection.sendall(data[cut:])
            connection.shutdown(socket.SHUT_WR)
            connections.append(connection)
        for connection in connections:
            answer(agent, connection)


def cost() -> tuple[int, int, int]:
    """Open descriptors, living peers and streams, bytes of memory."""
    gc.collect()
    kept = sum(type(thing) in (Peer, Stream) for thing in gc.get_objects())
    return len(os.listdir("/proc/self/fd")), kept, psutil.Process().memory_info().rss


def test_thousands_of_broken_handshakes_open_nothing_and_leave_nothing(agent: Agent) -> None:
    choose = random.Random(7)
    outsiders(agent, choose, 50)
    serves(agent)
    before = cost()
    for _ in range(50):
        outsiders(agent, choose, 40)
    unchanged = [insider(agent, choose) for _ in range(300)]
    agent.until(lambda: len(agent.closed) == len(agent.opened))
    assert len(agent.opened) == sum(map(bool, unchanged))
    assert agent.taken == []
    agent.opened.clear()
    agent.closed.clear()
    agent.until(lambda: not agent.peers._ending and not agent.peers._leaving)
    after = cost()
    assert after[0] == before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < 16 << 20
    serves(agent)


def test_broken_frames_of_a_peer_close_its_connection_and_nothing_else(agent: Agent) -> None:
    choose = random.Random(8)
    other = Agent(agent.loop)
    for _ in range(300):
        mine, theirs = other.meet(agent)
        mine._tell(choose.randbytes(choose.randrange(1, 400)))
        mine.close("test")
        agent.until(lambda theirs=theirs: theirs.how is not None)
    agent.opened.clear()
    agent.taken.clear()
    agent.closed.clear()
    other.peers.close()
    serves(agent)
