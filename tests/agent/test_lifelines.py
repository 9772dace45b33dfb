"""A worker's death by a signal is heard through its lifeline; nothing else is taken for one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from checkpointless_elastic.agent.lifelines import Lifelines
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.worker import lifeline

LIMIT_S = 30.0


def _worker(path: str, pipe: Connection) -> None:
    lifeline.hold(path)
    pipe.send_bytes(b"held")
    word = pipe.recv_bytes()
    if word == b"exec":
        os.execv("/bin/sleep", ["sleep", "60"])
    os._exit(3 if word == b"exit" else 0)


class Watched:
    """One worker process and what is heard of it."""

    def __init__(self, folder: Path) -> None:
        self.heard: list[tuple[int, int]] = []
        self.loop = EventLoop()
        self.lifelines = Lifelines(
            self.loop, lambda rank, incarnation: self.heard.append((rank, incarnation))
        )
        self.pipe, theirs = multiprocessing.get_context("fork").Pipe()
        path = str(folder / "lifeline")
        self.process = multiprocessing.get_context("fork").Process(target=_worker, args=(path, theirs))
        self.process.start()
        assert self.pipe.poll(LIMIT_S)
        self.pipe.recv_bytes()
        assert self.process.pid is not None
        self.lifelines.follow(path, 5, 2, self.process.pid)
        end = time.monotonic() + LIMIT_S
        while os.path.exists(path) and time.monotonic() < end:  # until the thread has taken it up
            self.loop.run(until=lambda: False, timeout=0.005)

    def listen(self, seconds: float) -> list[tuple[int, int]]:
        self.loop.run(until=lambda: bool(self.heard), timeout=seconds)
        return self.heard


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_death_by_a_signal_is_heard(number: signal.Signals, tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    assert watched.process.pid is not None
    os.kill(watched.process.pid, number)
    assert watched.listen(LIMIT_S) == [(5, 2)]
    watched.process.join(LIMIT_S)
    assert watched.process.exitcode == -number


@pytest.mark.parametrize("word", [b"exit", b"exec"])
def test_an_exit_or_another_program_is_not_taken_for_it(word: bytes, tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.pipe.send_bytes(word)
    assert watched.listen(0.5) == []
    watched.process.kill()
    watched.process.join(LIMIT_S)


def test_without_a_lifeline_nothing_is_heard_and_nothing_waits(tmp_path: Path) -> None:
    assert lifeline.wait(str(tmp_path / "none")) is False
    assert lifeline.dies_by_signal(os.getpid()) is False
