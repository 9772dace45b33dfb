"""Orders that come late, as they may in a tree of agents: a real agent, and a worker at its socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointless_elastic.agent.control import AgentControl
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.config import Config
from checkpointless_elastic.protocol.between import Ordered, Seated
from checkpointless_elastic.protocol.messages import (
    VERSION,
    Commit,
    Decision,
    Frames,
    Freeze,
    Hello,
    Message,
    Rebuild,
    Release,
    Resume,
    decode_to_worker,
    encode,
)
from checkpointless_elastic.protocol.rules import Rules
from checkpointless_elastic.protocol.station import Station

LIMIT_S = 30.0


class Workers:
    """The part of a workforce that an agent uses while nothing is wrong; the worker is this process."""

    ranks = [0]
    ended = ""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def log_dir(self) -> str:
        return ""


class Scene:
    """An agent with one rank, and what that rank hears on its two connections."""

    def __init__(self, run_dir: str) -> None:
        self.loop = EventLoop()
        self.control = AgentControl(Config(), Rules(), lambda: "localhost:1")
        self.control.attach(self.loop, Workers(run_dir), 1)  # type: ignore[arg-type]
        assert self.control.await_seat()
        self.control.started(0, 0, os.getpid(), "token")
        self.heard: list[Message] = []
        self._sockets = [self._connect(run_dir, channel) for channel in ("vote", "control")]
        assert self.loop.run(lambda: len(self.heard) == 2, LIMIT_S)  # Welcome
        self.heard.clear()

    def _connect(self, run_dir: str, channel: str) -> socket.socket:
        connection, frames = socket.socket(socket.AF_UNIX), Frames()
        connection.connect(os.path.join(run_dir, "agent.sock"))
        connection.sendall(encode(Hello(VERSION, 0, 0, "token", channel)))

        def read() -> None:
            self.heard.extend(map(decode_to_worker, frames.feed(connection.recv(1 << 16))))

        self.loop.watch(connection.fileno(), read)
        return connection

    def hears(self, *orders: Ordered) -> list[Message]:
        """What the worker hears of them."""
        for order in orders:
            self.control.obey(order)
        self.control.obey(Release(9))  # nothing can overtake it on the same connection
        self.control.obey(Freeze(9, [], []))
        assert self.loop.run(lambda: Release(9) in self.heard and Freeze(9, [], []) in self.heard, LIMIT_S)
        return [message for message in self.heard if message not in (Release(9), Freeze(9, [], []))]

    def close(self) -> None:
        self.control.stopped()
        for connection in self._sockets:
            connection.close()
        self.loop.close()


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(str(tmp_path))
    yield made
    made.close()


def test_orders_of_an_older_generation_do_not_reach_the_workers(it: Scene) -> None:
    late = [Freeze(1, [1], []), Decision(1, 4, [0], [1]), Rebuild(1, [1]), Resume(1), Commit(1, 4)]
    assert it.hears(Freeze(2, [2], []), *late) == [Freeze(2, [2], [])]


def test_a_freeze_that_was_repeated_does_not_reach_workers_that_have_resumed(it: Scene) -> None:
    recovery = [Freeze(1, [1], []), Decision(1, 4, [0], [1]), Rebuild(1, [1]), Resume(1)]
    assert sorted(it.hears(*recovery, Freeze(1, [1], [0])), key=repr) == sorted(recovery, key=repr)


def test_a_seat_that_has_resumed_is_not_taken_to_recover_by_a_freeze_that_comes_late() -> None:
    station = Station(Seated(1, 0, [0], 2, "", "", 0, 0, taken=False))
    assert station.obey(Freeze(1, [1], [])) and station.obey(Resume(1))
    assert not station.obey(Freeze(1, [1], [0]))
    assert not station.recovering
    assert station.obey(Freeze(2, [1], []))
    assert not station.obey(Resume(1))
    assert station.recovering
