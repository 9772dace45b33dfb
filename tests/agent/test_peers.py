"""Connections between agents: messages, and how connections end."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from checkpointless_elastic.agent import dial, peers
from checkpointless_elastic.agent.peers import Closed, Peers
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.errors import ConfigError, ProtocolError
from tests.agent.lone import lone_agent
from tests.agent.meeting import Agent, agents, identity


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def pair() -> Iterator[list[Agent]]:
    with agents(None, None) as made:
        yield made


# ---- messages ------------------------------


def test_both_sides_learn_who_the_other_one_is(pair: list[Agent]) -> None:
    one, two = pair
    mine, theirs = one.meet(two)
    assert (mine.agent, mine.incoming) == (two.who.agent, False)
    assert (theirs.agent, theirs.incoming) == (one.who.agent, True)


def test_messages_of_all_sizes_arrive_whole_and_in_order_both_ways(pair: list[Agent]) -> None:
    one, two = pair
    mine, theirs = one.meet(two)
    sizes = [1, 0, 3, 70_000, 20_000_000, 2, 1 << 20, 65_536, 5]
    bodies = [random.Random(size).randbytes(size) for size in sizes]
    for body in bodies:
        mine.send(body)
        theirs.send(body[::-1])
    one.until(lambda: len(one.taken) == len(two.taken) == len(sizes), 20.0)
    assert two.bodies() == bodies
    assert one.bodies() == [body[::-1] for body in bodies]


def test_agents_on_two_threads_answer_each_other() -> None:
    with agents(None) as (one,):
        stop = threading.Event()
        ready = threading.Event()
        address = []

        def serve() -> None:
            with agents(None) as (two,):
                two.react = lambda peer, body: peer.send(body + b"!")
                address.append(two.address)
                ready.set()
                while not stop.is_set():
                    two.loop.run(lambda: False, 0.02)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert ready.wait(10.0)
            peer = one.peers.connect(address[0])
            one.react = lambda peer, body: peer.send(body) if len(one.taken) < 200 else None
            peer.send(b"?")
            one.until(lambda: len(one.taken) == 200)
        finally:
            stop.set()
            thread.join()
        assert one.bodies()[-1] == b"?" + b"!" * 200


def test_messages_sent_before_the_connection_is_opened_come_first(pair: list[Agent]) -> None:
    one, two = pair
    peer = one.peers.connect(two.address)
    peer.send(b"early")
    one.until(lambda: peer.is_open)
    peer.send(b"late")
    one.until(lambda: len(two.taken) == 2)
    assert two.bodies() == [b"early", b"late"]


def test_a_peer_that_never_reads_is_given_up_and_send_neither_waits_nor_raises(
    pair: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MAX_WAITING", 20 << 20)
    one, _ = pair
    with lone_agent() as (process, address):
        peer = one.peers.connect(address)
        one.until(lambda: peer.is_open)
        process.send_signal(signal.SIGSTOP)
        for _ in range(40):
            peer.send(bytes(1 << 20))
        assert one.closed == []
        one.until(lambda: bool(one.closed))
        ((_, how, reason),) = one.closed
    assert how is Closed.GONE
    assert "it does not read: " in reason
    peer.send(b"to nobody")


def test_a_message_over_the_limit_closes_the_connection(
    pair: list[Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    mine, _ = one.meet(two)
    monkeypatch.setattr(peers, "MAX_MESSAGE", 10)
    mine.send(b"x" * 11)
    one.until(lambda: bool(one.closed))
    assert "a message of 11 bytes is over the limit of 10" in one.closed[0][2]
    assert two.taken == []


# ---- ends ------------------------------


def test_nobody_listening_is_refused_at_once(pair: list[Agent]) -> None:
    address = f"127.0.0.1:{free_port()}"
    for _ in range(2):
        how, reason = pair[0].fate(address)
        assert how is Closed.REFUSED
        assert reason == "refused (Connection refused)"


def test_a_closed_connection_is_gone_after_its_last_messages(pair: list[Agent]) -> None:
    one, two = pair
    mine, theirs = one.meet(two)
    mine.send(b"unread" * 100_000)
    theirs.send(b"last words" * 100_000)
    theirs.close("test")
    one.until(lambda: bool(one.closed))
    assert one.bodies() == [b"last words" * 100_000]
    assert one.closed == [(mine, Closed.GONE, "closed by the peer")]
    assert two.closed == []
    assert theirs.how is Closed.GONE


def test_a_killed_peer_is_gone() -> None:
    with agents(None) as (one,), lone_agent() as (process, address):
        peer = one.peers.connect(address)
        one.until(lambda: peer.is_open)
        process.kill()
        one.until(lambda: bool(one.closed))
        assert one.closed[0][:2] == (peer, Closed.GONE)
        process.wait()
        assert one.fate(address)[0] is Closed.REFUSED


def test_a_peer_killed_in_the_handshake_is_gone() -> None:
    with agents(None) as (one,), lone_agent() as (process, address):
        process.send_signal(signal.SIGSTOP)
        peer = one.peers.connect(address)
        one.until(lambda: peer._stream is not None)
        process.kill()
        one.until(lambda: bool(one.closed))
        assert one.closed[0][:2] == (peer, Closed.GONE)
        assert "during the handshake" in one.closed[0][2]


def test_a_stopped_peer_is_timed_out_in_the_handshake() -> None:
    with agents(None, limit=0.3) as (one,), lone_agent() as (process, address):
        process.send_signal(signal.SIGSTOP)
        how, reason = one.fate(address)
    assert (how, reason) == (Closed.TIMEOUT, "timed out: no handshake within 0.3 s")


@contextmanager
def silent_host() -> Iterator[tuple[str, int]]:
    """A listener whose queue is full: the kernel drops what comes, as a host behind a cut link does."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(full.getsockname())
        yield full.getsockname()


def test_a_host_that_does_not_answer_is_timed_out() -> None:
    with silent_host() as (_, port), agents(None, limit=0.3) as (one,):
        how, reason = one.fate(f"127.0.0.1:{port}")
    assert (how, reason) == (Closed.TIMEOUT, "timed out: no connection within 0.3 s")


def test_nobody_is_told_of_what_this_side_closed(pair: list[Agent]) -> None:
    one, two = pair
    mine, _ = one.meet(two)
    mine.close("done")
    mine.close("done")
    early = one.peers.connect(two.address)
    early.close("changed its mind")
    refused = one.peers.connect(f"127.0.0.1:{free_port()}")
    refused.close("changed its mind")
    one.until(lambda: bool(two.closed))
    assert not one.loop.run(lambda: bool(one.closed), 0.05)


def test_closing_from_inside_the_callbacks_takes_effect_at_once(pair: list[Agent]) -> None:
    one, two = pair
    mine, _ = one.meet(two)
    two.react = lambda peer, body: peer.close("enough")
    for _ in range(3):
        mine.send(b"x")
    one.until(lambda: bool(one.closed))
    assert two.bodies() == [b"x"]


def test_all_connections_end_when_an_agent_closes(pair: list[Agent]) -> None:
    one, two = pair
    mine, _ = one.meet(two)
    two.react = lambda peer, body: two.peers.close()
    mine.send(b"x")
    mine.send(b"x")
    one.until(lambda: bool(one.closed))
    assert two.bodies() == [b"x"]
    assert one.fate(two.address)[0] is Closed.REFUSED
    late = two.peers.connect(one.address)
    assert late.how is Closed.GONE
    assert not one.loop.run(lambda: bool(two.closed), 0.05)


def test_many_connections_closed_at_once_all_deliver_their_last_message(pair: list[Agent]) -> None:
    one, two = pair
    both = [one.meet(two) for _ in range(100)]
    for mine, theirs in both:
        mine.send(b"unread")
        theirs.send(bytes(300_000))
        theirs.close("test")
    one.until(lambda: len(one.closed) == 100)
    assert one.bodies() == [bytes(300_000)] * 100
    one.until(lambda: not two.peers._ending)


def test_a_message_that_its_taker_refuses_closes_the_connection(
    pair: list[Agent], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = pair
    mine, theirs = one.meet(two)

    def refuse(peer: object, body: bytes) -> None:
        raise ProtocolError("That is no message.")

    two.react = refuse
    mine.send(b"nonsense")
    one.until(lambda: bool(one.closed))
    assert two.closed == [(theirs, Closed.REJECTED, "not accepted: That is no message")]
    assert one.closed == [(mine, Closed.GONE, "closed by the peer")]
    assert "That is no message" in caplog.text


def test_a_length_over_the_limit_closes_the_connection(pair: list[Agent]) -> None:
    one, two = pair
    mine, _ = one.meet(two)
    mine._tell(b"\xff\xff\xff\xff")
    one.until(lambda: bool(two.closed))
    assert two.closed[0][1] is Closed.REJECTED
    assert "4294967295 bytes" in two.closed[0][2]


def test_connecting_to_oneself_is_not_accepted(pair: list[Agent], caplog: pytest.LogCaptureFixture) -> None:
    how, reason = pair[0].fate(pair[0].address)
    assert (how, reason) == (Closed.REJECTED, "not accepted: it refused this agent: it is the same agent")
    assert "it is this agent itself" in caplog.text


def test_closing_leaves_no_thread_and_no_descriptor_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    before = open_files()
    with agents(None, None, None) as made:
        made[0].meet(made[1])
        mine, _ = made[1].meet(made[2])
        mine.close("half way")
        made[2].peers.connect(made[0].address)
    assert open_files() == before


def open_files() -> int:
    return len(list(os.scandir("/proc/self/fd")))


# ---- addresses ------------------------------


def test_a_name_is_resolved_and_its_addresses_are_tried_in_turn(pair: list[Agent]) -> None:
    """localhost may be ::1 first, where nobody listens."""
    one, two = pair
    peer = one.peers.connect(f"localhost:{two.peers.port}")
    one.until(lambda: peer.how is not None or peer.is_open)
    assert peer.agent == two.who.agent


def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    class Book(dial.Resolver):
        def look_up(self, host: str, port: int, found: dial.Found) -> None:
            self._loop.call_later(
                0.0, lambda: found([(socket.AF_INET, where) for where in (silent, there)], "")
            )

    with agents(None, limit=0.6) as (one,), silent_host() as silent:
        there = ("127.0.0.1", one.peers.port)
        connected: list[socket.socket] = []
        book = Book(one.loop)
        dial.Dial(one.loop, book, "node:1", 0.6, connected.append, lambda how, reason: None)
        one.until(lambda: bool(connected))
        assert connected[0].getpeername() == there
        connected[0].close()
        book.close()


@pytest.mark.parametrize("address", ["\udce9:80", "a" * 300 + ":80"])
def test_a_name_that_cannot_be_resolved_times_out_at_once(pair: list[Agent], address: str) -> None:
    how, reason = pair[0].fate(address)
    assert how is Closed.TIMEOUT
    assert "cannot be resolved" in reason


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":80", "host:port", "host:0", "host:65536", "host:-1"]
)
def test_a_malformed_address_is_said_to_be(pair: list[Agent], address: str) -> None:
    assert "is not of the form host:port" in pair[0].fate(address)[1]


def test_addresses_of_both_kinds_are_understood() -> None:
    assert dial.split_address("10.0.0.1:29500") == ("10.0.0.1", 29500)
    assert dial.split_address("[::1]:29500") == ("::1", 29500)
    assert dial.split_address("node-7:29500") == ("node-7", 29500)


def test_an_unknown_interface_or_an_unreachable_network_is_no_way_to_it(pair: list[Agent]) -> None:
    how, reason = pair[0].fate("[fe80::1%nowhere9]:80")
    assert how is Closed.TIMEOUT
    assert "no way to it" in reason


def test_a_socket_that_linux_connected_to_itself_counts_as_refused() -> None:
    with socket.socket() as alone:
        alone.bind(("127.0.0.1", 0))
        alone.connect(alone.getsockname())
        assert dial._to_itself(alone)


def test_a_port_that_is_taken_is_a_clear_error(pair: list[Agent]) -> None:
    loop = EventLoop()
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{pair[0].peers.port}"):
        Peers(
            loop,
            identity(),
            ("127.0.0.1", pair[0].peers.port),
            opened=lambda peer: None,
            take=lambda peer, body: None,
            closed=lambda peer, reason: None,
        )
    loop.close()
