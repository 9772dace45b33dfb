"""A worker's two connections to its agent.

*vote* belongs to the main thread: it says ``Ready`` and reads the answer itself, since handing a message from one
thread to another costs more than the whole vote. *control* belongs to the listener thread, which must be able to take
a ``Freeze`` at any moment, also while the main thread is inside a collective.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.messages import (
    VERSION,
    Frames,
    Hello,
    Message,
    Refused,
    ToWorker,
    Welcome,
    decode_to_worker,
    encode,
)

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 60.0


class AgentGone(BaseException):
    """The agent has closed the connection: the job is over. Not an Exception, so that no user's handler hides it."""


class Connection:
    """One connection. ``send`` may be used by several threads, ``receive`` by one."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        self._socket.connect(path)
        self._frames = Frames()
        self._bodies: deque[bytes] = deque()
        self._send_lock = threading.Lock()

    def unlimited(self) -> None:
        """From now on ``receive`` waits as long as the agent lives: the agent has the deadlines."""
        self._socket.settimeout(None)

    def send(self, message: Message) -> None:
        """Send one message. Raises AgentGone when the agent is not there."""
        data = encode(message)
        try:
            with self._send_lock:
                self._socket.sendall(data)
        except OSError as error:
            raise AgentGone from error

    def readable(self, seconds: float) -> bool:
        """Whether ``receive`` has something to return, or the agent is gone, within this time. By the receiver."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(self._bodies) or bool(poll.poll(1000 * seconds))

    def receive(self) -> ToWorker:
        """The next message; blocks. Raises AgentGone when the agent has closed the connection."""
        while not self._bodies:
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                raise AgentGone from error
            if not data:
                raise AgentGone
            self._bodies.extend(self._frames.feed(data))
        return decode_to_worker(self._bodies.popleft())

    def close(self) -> None:
        """Close; a blocked ``receive`` ends with AgentGone."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("the agent had closed the connection before")
        self._socket.close()


class Channel:
    """Both connections of one worker, greeted and accepted.

    Attributes:
        welcome: the agent's answer: generation in force, and whether this worker starts in shadow.
    """

    def __init__(self, path: str, rank: int, incarnation: int, token: str) -> None:
        self.control, welcome = _greet(path, Hello(VERSION, rank, incarnation, token, "control"))
        self.vote, _ = _greet(path, Hello(VERSION, rank, incarnation, token, "vote"))
        self.welcome = welcome
        self._closing = False
        self._thread: threading.Thread | None = None

    def listen(self, take: Callable[[ToWorker], None]) -> None:
        """Start the listener thread, which calls ``take`` for each control message."""
        self._thread = threading.Thread(
            target=self._listen, args=(take,), name="checkpointless-listener", daemon=True
        )
        self._thread.start()

    def _listen(self, take: Callable[[ToWorker], None]) -> None:
        try:
            while True:
                take(self.control.receive())
        except AgentGone:
            if not self._closing:
                logger.error("The agent is gone: this worker ends.")
                os._exit(1)
        except BaseException:
            # The others would wait for this rank's answers until a deadline; its replacement gives them.
            logger.critical("A message of the agent could not be handled: this worker ends.", exc_info=True)
            os._exit(1)

    def expect_end(self) -> None:
        """The agent has said its last word on these connections. Any thread."""
        self._closing = True

    def close(self) -> None:
        """Close both connections and end the listener thread."""
        self._closing = True
        self.control.close()
        self.vote.close()
        if self._thread is not None:
            self._thread.join()


def _greet(path: str, hello: Hello) -> tuple[Connection, Welcome]:
    connection = Connection(path)
    connection.send(hello)
    answer = connection.receive()
    if isinstance(answer, Refused):
        raise ProtocolError(f"The agent refused this worker: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise ProtocolError(
            f"The agent answered Hello with {type(answer).__name__}; is it of another version?"
        )
    connection.unlimited()
    return connection, answer
