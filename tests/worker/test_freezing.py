"""What a worker makes of a Freeze, with a real socket to an agent that the test plays."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointless_elastic.protocol.messages import (
    Frames,
    Freeze,
    Frozen,
    Welcome,
    decode_from_worker,
    encode,
)
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.ballot import Ballot, ballot_path
from checkpointless_elastic.worker.channel import Channel
from checkpointless_elastic.worker.private import slot_path
from checkpointless_elastic.worker.session import Session

LIMIT_S = 30.0


class Agent:
    """Accepts a worker's two connections, and reads what it says on the first one, control."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._frames = Frames()
        self.connections: list[socket.socket] = []

    def greet(self) -> None:
        for _ in range(2):
            connection, _ = self._listener.accept()
            connection.settimeout(LIMIT_S)
            self.connections.append(connection)
            frames = Frames()
            while not frames.feed(connection.recv(1 << 16)):
                pass
            connection.sendall(encode(Welcome(0, False)))

    def answer(self) -> Frozen:
        while True:
            for body in self._frames.feed(self.connections[0].recv(1 << 16)):
                said = decode_from_worker(body)
                assert isinstance(said, Frozen)
                return said


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Session, Agent]]:
    """A worker's session, and its agent."""
    Slot.create(slot_path(str(tmp_path), 0))
    Ballot.create(ballot_path(str(tmp_path)), 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        listener.settimeout(LIMIT_S)
        agent = Agent(listener)
        thread = threading.Thread(target=agent.greet)
        thread.start()
        channel = Channel(str(tmp_path / "agent.sock"), 0, 0, "token")
        thread.join(LIMIT_S)
        yield Session(channel, 0, str(tmp_path), lambda: None), agent
        channel.close()
        for connection in agent.connections:
            connection.close()


def test_a_freeze_that_is_repeated_for_others_after_a_rank_has_resumed_freezes_nothing(
    both: tuple[Session, Agent],
) -> None:
    session, agent = both
    session.take(Freeze(1, [1], []))
    assert agent.answer().generation == 1
    assert session.freeze_seen.is_set() and session.is_frozen()
    assert session.resumed(1)
    session.take(Freeze(1, [1], [2]))
    assert agent.answer().generation == 1
    assert not session.freeze_seen.is_set() and not session.is_frozen()
