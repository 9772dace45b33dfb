"""A worker's connections to its agent, with a real socket and a process of its own."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

from checkpointless_elastic.protocol.messages import Frames, Freeze, ToWorker, Welcome, encode
from checkpointless_elastic.worker.channel import Channel

LIMIT_S = 30.0


def serve_with_a_fault(path: str) -> None:
    """A worker that cannot handle what comes, and whose main thread is busy with other things."""

    def take(message: ToWorker) -> None:
        raise ValueError(f"{type(message).__name__} is too much")

    Channel(path, 0, 0, "token").listen(take)
    multiprocessing.Event().wait()


def greeted(listener: socket.socket) -> socket.socket:
    """The agent's end of a worker's next connection."""
    connection, _ = listener.accept()
    connection.settimeout(LIMIT_S)
    frames = Frames()
    while not frames.feed(connection.recv(1 << 16)):
        pass
    connection.sendall(encode(Welcome(0, False)))
    return connection


def test_a_worker_whose_listener_fails_ends_so_that_the_others_need_not_wait_for_it(tmp_path: Path) -> None:
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(LIMIT_S)
        worker = multiprocessing.get_context("spawn").Process(target=serve_with_a_fault, args=(path,))
        worker.start()
        try:
            with greeted(listener) as control, greeted(listener):
                control.sendall(encode(Freeze(1, [1], [])))
                worker.join(LIMIT_S)
                assert worker.exitcode == 1
        finally:
            worker.kill()
            worker.join()
