"""Messages to workers, over real sockets: whole and in order, however slowly a worker reads."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from checkpointless_elastic.agent.links import MAX_WAITING, Links
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.protocol.messages import (
    VERSION,
    Frames,
    Hello,
    Message,
    Rebuild,
    Restore,
    Welcome,
    decode_to_worker,
    encode,
)

RANK = 1
LARGE = encode(Restore(1, {0: bytes(1_000_000)}))


class Scene:
    """An agent's end, and a worker that reads when it is told to."""

    def __init__(self, path: str) -> None:
        self.loop = EventLoop()
        self.choked: list[tuple[int, str]] = []
        self.links = Links(
            path,
            self.loop,
            lambda hello: Welcome(0, False),
            lambda rank, message: None,
            lambda *what: self.choked.append(what),
        )
        self.worker = socket.socket(socket.AF_UNIX)
        self.worker.connect(path)
        self.worker.sendall(encode(Hello(VERSION, RANK, 0, "token", "vote")))
        self.worker.setblocking(False)
        self._frames = Frames()
        assert self.loop.run(lambda: self.send(encode(Rebuild(0, []))), 10.0)

    def send(self, data: bytes) -> bool:
        return self.links.send(RANK, "vote", data)

    def read(self, count: int) -> list[Message]:
        """The next messages, while the loop is served."""
        got: list[Message] = []

        def look() -> None:
            got.extend(map(decode_to_worker, self._frames.feed(self.worker.recv(1 << 16))))

        self.loop.watch(self.worker.fileno(), look)
        assert self.loop.run(lambda: len(got) >= count, 10.0), got
        self.loop.unwatch(self.worker.fileno())
        return got

    def close(self) -> None:
        self.links.close()
        self.worker.close()
        self.loop.close()


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    with closing(Scene(str(tmp_path / "agent.sock"))) as made:
        yield made


def test_a_worker_that_reads_late_gets_every_message_whole_and_in_order(it: Scene) -> None:
    assert it.send(LARGE)
    assert it.send(encode(Rebuild(1, [2])))
    assert it.read(4)[2:] == [Restore(1, {0: bytes(1_000_000)}), Rebuild(1, [2])]
    assert it.send(LARGE)
    assert it.read(1) == [Restore(1, {0: bytes(1_000_000)})]


def test_what_waits_for_a_worker_is_bounded_and_then_the_worker_is_given_up_once(it: Scene) -> None:
    sent = 0
    while it.send(LARGE):
        sent += 1
    assert not it.send(LARGE)
    assert MAX_WAITING - 2 * len(LARGE) < sent * len(LARGE) <= MAX_WAITING + len(LARGE)
    assert it.loop.run(lambda: bool(it.choked), 10.0)
    ((rank, reason),) = it.choked
    assert rank == RANK
    assert reason.startswith("did not read what its agent sent: ")


def test_one_message_of_the_largest_size_may_always_wait(it: Scene) -> None:
    largest = encode(Restore(1, {0: bytes(MAX_WAITING - 100)}))
    assert it.send(largest)
    assert it.read(3)[2:] == [Restore(1, {0: bytes(MAX_WAITING - 100)})]


def test_a_worker_that_goes_away_while_messages_wait_is_forgotten(it: Scene) -> None:
    assert it.send(LARGE)
    it.worker.close()
    assert it.loop.run(lambda: not it.send(encode(Rebuild(1, []))), 10.0)
    assert it.loop.run(lambda: not it.links._links, 10.0)
