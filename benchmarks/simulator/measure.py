"""Messages and bytes of each agent."""

from __future__ import annotations

from collections import Counter

import msgspec

from checkpointless_elastic.protocol.between import Beat, Between

__all__ = ["Traffic"]


class Traffic:
    """Counts what each agent sends and takes, heartbeats apart.

    Attributes:
        weigh: also count bytes (each message is encoded).
        messages, bytes, beats: by agent's name.
    """

    def __init__(self) -> None:
        self.weigh = False
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.beats: Counter[str] = Counter()
        self._encoder = msgspec.msgpack.Encoder()
        self._last: tuple[Between | None, int] = (None, 0)

    def sent(self, name: str, message: Between) -> None:
        self._count(name, message)

    def took(self, name: str, message: Between) -> None:
        self._count(name, message)

    def copied(self, ward: str, guardian: str) -> None:
        """A private state went to its guardian: its size is the script's and does not count here."""
        self.messages[ward] += 1
        self.messages[guardian] += 1

    def _count(self, name: str, message: Between) -> None:
        if isinstance(message, Beat):
            self.beats[name] += 1
            return
        self.messages[name] += 1
        if self.weigh:
            if self._last[0] is not message:
                self._last = (message, 4 + len(self._encoder.encode(message)))
            self.bytes[name] += self._last[1]

    def clear(self) -> None:
        """Count from here."""
        self.messages.clear()
        self.bytes.clear()
        self.beats.clear()
