"""A connection to another agent that belongs to one thread, which may block on it: for whole mirrors.

It is made by `Peers`, with its proof of who is at the other end and its TLS, and then taken out of the event loop: bulk
data must not keep heartbeats and votes waiting. Without TLS the bytes of a mirror go from the page cache to the kernel
and from the kernel to where they are kept, and no Python code sees them.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

from checkpointless_elastic.agent.channel import Channel, Plain
from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.guarding import OnBulk, decode_bulk
from checkpointless_elastic.protocol.messages import MAX_MESSAGE, Message, encode

__all__ = ["Wire"]

STALL_S = 60.0
"""How long nothing may move. A lost node is found much sooner, by its heartbeats; but a guardian makes room for a
mirror before it reads it, some 0.35 s per GiB."""
_CHUNK = 1 << 20
_LENGTH = struct.Struct("<I")


class Wire:
    """Methods raise OSError when the other side is gone, or has not moved for STALL_S; ProtocolError when it sends what
    it must not.
    """

    def __init__(self, connection: socket.socket, channel: Channel) -> None:
        connection.settimeout(STALL_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * STALL_S))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, round(STALL_S))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        self._socket, self._channel = connection, channel
        self._rest = memoryview(b"")  # what came with TLS and is not yet taken

    def send(self, message: Message) -> None:
        """Send one message."""
        self._socket.sendall(self._channel.seal(encode(message)))

    def send_file(self, path: str, nbytes: int) -> None:
        """Send so many bytes of a file, from its start. OSError too if it is gone or shorter."""
        with open(path, "rb", buffering=0) as file:
            if isinstance(self._channel, Plain):
                sent = self._socket.sendfile(file, 0, nbytes) if nbytes else 0
            else:
                sent = self._seal_file(file.fileno(), nbytes)
        if sent < nbytes:
            raise FileNotFoundError(f"{path} has {sent} bytes instead of {nbytes}")

    def _seal_file(self, descriptor: int, nbytes: int) -> int:
        sent = 0
        while data := os.pread(descriptor, min(_CHUNK, nbytes - sent), sent):
            self._socket.sendall(self._channel.seal(data))
            sent += len(data)
        return sent

    def send_memory(self, data: memoryview) -> None:
        """Send these bytes."""
        for start in range(0, len(data), _CHUNK):
            part = data[start : start + _CHUNK]
            if isinstance(self._channel, Plain):
                self._socket.sendall(part)
            else:
                self._socket.sendall(self._channel.seal(bytes(part)))

    def receive(self, idle: bool = False) -> OnBulk:
        """The next message. ``idle``: it may come at any time, as long as the other side lives."""
        head = memoryview(bytearray(_LENGTH.size))
        self._socket.settimeout(None if idle else STALL_S)
        self.receive_into(head[:1])
        self._socket.settimeout(STALL_S)
        self.receive_into(head[1:])
        (length,) = _LENGTH.unpack(head)
        if length > MAX_MESSAGE:
            raise ProtocolError(f"A peer announced a message of {length} bytes; the limit is {MAX_MESSAGE}.")
        body = bytearray(length)
        self.receive_into(memoryview(body))
        return decode_bulk(bytes(body))

    def receive_into(self, target: memoryview) -> None:
        """Fill this memory."""
        while target:
            target = target[self._some(target) :]

    def _some(self, target: memoryview) -> int:
        if isinstance(self._channel, Plain):
            count = self._socket.recv_into(target)
            if not count:
                raise ConnectionResetError("closed by the peer")
            return count
        while not self._rest:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("closed by the peer")
            self._rest = memoryview(self._channel.open(data))
        count = min(len(target), len(self._rest))
        target[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def end(self) -> None:
        """Any thread: whatever is blocked here fails now. The descriptor stays that of the thread that uses it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """By the thread that uses it."""
        self._socket.close()
