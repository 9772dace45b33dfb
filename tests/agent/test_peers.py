"""Connections between agents: messages, and how connections end."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from checkpointless_elastic.agent.peers import Closed
from tests.agent.meeting import Agent, agents


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def pair() -> Iterator[list[Agent]]:
    with agents(None, None) as made:
        yield made


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


def test_nobody_listening_is_refused_at_once(pair: list[Agent]) -> None:
    how, reason = pair[0].fate(f"127.0.0.1:{free_port()}")
    assert how is Closed.REFUSED
    assert "refused" in reason


def test_a_closed_connection_is_gone_after_its_last_messages(pair: list[Agent]) -> None:
    one, two = pair
    mine, theirs = one.meet(two)
    theirs.send(b"last words" * 100_000)
    theirs.close("test")
    one.until(lambda: bool(one.closed))
    assert one.bodies() == [b"last words" * 100_000]
    assert one.closed == [(mine, Closed.GONE, "closed by the peer")]
    assert two.closed == []


def test_messages_sent_before_the_connection_is_opened_come_first(pair: list[Agent]) -> None:
    one, two = pair
    peer = one.peers.connect(two.address)
    peer.send(b"early")
    one.until(lambda: peer.is_open)
    peer.send(b"late")
    one.until(lambda: len(two.taken) == 2)
    assert two.bodies() == [b"early", b"late"]
