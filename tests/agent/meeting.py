"""Agents that meet on loopback, on one loop or on several, and what each of them was told."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from checkpointless_elastic.agent.credentials import Tls
from checkpointless_elastic.agent.peers import Closed, Identity, Peer, Peers
from checkpointless_elastic.agent.runtime import EventLoop

TOKEN = b"a token that only the tests know"
_numbers = itertools.count()


def identity(tls: Tls | None = None, **changes: Any) -> Identity:
    """An agent of the job "job", with another id each time."""
    return replace(Identity("job", f"agent-{next(_numbers)}", TOKEN, tls), **changes)


class Agent:
    """One Peers and everything that it reported."""

    def __init__(self, loop: EventLoop, who: Identity | None = None, **options: Any) -> None:
        self.loop = loop
        self.who = who or identity()
        self.opened: list[Peer] = []
        self.taken: list[tuple[Peer, bytes]] = []
        self.closed: list[tuple[Peer, Closed, str]] = []
        self.react: Callable[[Peer, bytes], None] = lambda peer, body: None
        self.peers = Peers(
            loop,
            self.who,
            ("127.0.0.1", 0),
            opened=self.opened.append,
            take=self._take,
            closed=self._closed,
            **options,
        )

    def _take(self, peer: Peer, body: bytes) -> None:
        self.taken.append((peer, body))
        self.react(peer, body)

    def _closed(self, peer: Peer, reason: str) -> None:
        assert peer.how is not None
        self.closed.append((peer, peer.how, reason))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.peers.port}"

    def bodies(self) -> list[bytes]:
        """What came, in order."""
        return [body for _, body in self.taken]

    def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Serve the loop until the condition holds."""
        assert self.loop.run(condition, seconds), f"{self.opened} {self.closed}"

    def meet(self, other: Agent) -> tuple[Peer, Peer]:
        """Connect; both ends, this agent's first. On one loop."""
        opened = len(other.opened)
        mine = self.peers.connect(other.address)
        self.until(lambda: (mine.is_open and len(other.opened) > opened) or bool(self.closed))
        return mine, other.opened[-1]

    def fate(self, address: str) -> tuple[Closed, str]:
        """Connect to something that is no peer, and how it ends."""
        peer = self.peers.connect(address)
        self.until(lambda: peer.how is not None)
        ((_, how, reason),) = [entry for entry in self.closed if entry[0] is peer]
        return how, reason


@contextmanager
def agents(*who: Identity | None, **options: Any) -> Iterator[list[Agent]]:
    """That many agents on one loop."""
    loop = EventLoop()
    made = [Agent(loop, one, **options) for one in who]
    try:
        yield made
    finally:
        for agent in made:
            agent.peers.close()
        loop.close()


@contextmanager
def raw(agent: Agent) -> Iterator[socket.socket]:
    """A plain TCP connection to an agent."""
    with closing(socket.create_connection(("127.0.0.1", agent.peers.port), 10.0)) as connection:
        connection.setblocking(False)
        yield connection


def answer(agent: Agent, connection: socket.socket, enough: int = 1 << 30, seconds: float = 10.0) -> bytes:
    """What the agent sends on this connection until it closes it, or that many bytes."""
    got = bytearray()
    ended = False

    def look() -> None:
        nonlocal ended
        try:
            data = connection.recv(1 << 16)
        except ConnectionError:
            data = b""
        got.extend(data)
        ended = not data

    agent.loop.watch(connection.fileno(), look)
    try:
        assert agent.loop.run(lambda: ended or len(got) >= enough, seconds), bytes(got)
    finally:
        agent.loop.unwatch(connection.fileno())
    return bytes(got)
