"""A cable of bad quality: forwards frames between two devices late, or not at all.

Stands in for netem, which many kernels lack. Runs by itself, with the standard library only, inside the namespace of
the devices:

    wire.py plain DEVICE                                    frames leave the device as they would a real card: no
                                                            larger than its MTU, with checksums
    wire.py forward ONE OTHER DELAY_MS JITTER_MS LOSS_PERCENT   forwards until it is killed; says "ready" first
"""

from __future__ import annotations

import array
import fcntl
import random
import select
import socket
import struct
import sys
import time
from collections import deque

ALL_FRAMES = 3  # ETH_P_ALL
SIOCETHTOOL = 0x8946
NO_SEGMENTS_NO_CHECKSUMS = (0x1F, 0x24, 0x19, 0x17)  # ETHTOOL_STSO, _SGSO, _SSG, _STXCSUM
RECEIVE_BUFFER_FORCE = 33  # SO_RCVBUFFORCE
BUFFER = 1 << 24
LARGEST = 1 << 16


def plain(device: str) -> None:
    """Switches off what the kernel leaves to the card."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        for command in NO_SEGMENTS_NO_CHECKSUMS:
            value = array.array("I", [command, 0])
            request = struct.pack("16sP8x", device.encode(), value.buffer_info()[0])
            fcntl.ioctl(anything, SIOCETHTOOL, request)


def opened(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_FRAMES))
    end.setsockopt(socket.SOL_SOCKET, RECEIVE_BUFFER_FORCE, BUFFER)
    end.bind((device, ALL_FRAMES))
    end.setblocking(False)
    return end


class Direction:
    """Frames on their way from one device to another; none overtakes another."""

    def __init__(
        self, source: socket.socket, target: socket.socket, quality: tuple[float, float, float]
    ) -> None:
        self.source, self.target = source, target
        self._delay, self._jitter, self._loss = quality
        self._waiting: deque[tuple[float, bytes]] = deque()

    def take(self, now: float) -> None:
        """Everything that has come."""
        while True:
            try:
                frame, sender = self.source.recvfrom(LARGEST)
            except BlockingIOError:
                return
            if sender[2] == socket.PACKET_OUTGOING or random.random() < self._loss:
                continue
            due = now + self._delay + random.uniform(-self._jitter, self._jitter)
            self._waiting.append((max(due, self._waiting[-1][0] if self._waiting else 0.0), frame))

    def give(self, now: float) -> None:
        """Everything that is due; a device that takes no more loses it, as a full queue does."""
        while self._waiting and self._waiting[0][0] <= now:
            try:
                self.target.send(self._waiting.popleft()[1])
            except OSError:
                continue

    def due(self) -> float:
        return self._waiting[0][0] if self._waiting else float("inf")


def forward(one: str, other: str, quality: tuple[float, float, float]) -> None:
    ends = opened(one), opened(other)
    ways = Direction(ends[0], ends[1], quality), Direction(ends[1], ends[0], quality)
    print("ready", flush=True)
    while True:
        wait = min(way.due() for way in ways) - time.monotonic()
        select.select(ends, (), (), None if wait == float("inf") else max(0.0, wait))
        now = time.monotonic()
        for way in ways:
            way.take(now)
            way.give(now)


def main() -> None:
    job, *arguments = sys.argv[1:]
    if job == "plain":
        plain(arguments[0])
    else:
        delay, jitter, loss = map(float, arguments[2:])
        forward(arguments[0], arguments[1], (delay / 1e3, jitter / 1e3, loss / 100))


if __name__ == "__main__":
    main()
