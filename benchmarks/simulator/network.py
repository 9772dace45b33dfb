"""Connections between agents: each way first in, first out; they delay, break, or fall silent.

What is sent while two machines are cut off from each other comes when they are not any more, as TCP sends again.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from checkpointless_elastic.protocol.between import Between
from checkpointless_elastic.protocol.member import Closed
from simulator.clock import Clock

__all__ = ["Host", "Network"]


class Host(Protocol):
    """One process on one machine.

    Attributes:
        alive: this process.
        answers: its machine, after the process has gone: connections are refused, not lost in silence.
        side: machines of different sides cannot reach each other.
        frozen: stopped for a while.
    """

    name: str
    alive: bool
    answers: bool
    side: int
    frozen: bool

    def opened(self, link: int) -> None: ...

    def closed(self, link: int, why: Closed, reason: str) -> None: ...

    def received(self, link: int, message: Between) -> None: ...


@dataclass(eq=False)
class _End:
    """One end of a connection. ``last``: when what was sent last from here arrives; ``mute``: nothing does any more."""

    host: Host
    link: int
    peer: _End | None = None
    last: float = 0.0
    mute: bool = False
    given_up: bool = False
    sent: deque[Between | None] = field(default_factory=deque)  # None: closed


class Network:
    """Attributes: ``slow``: seconds that are added to some delays; ``fixed``: every delay, for stories."""

    def __init__(self, clock: Clock, draw: random.Random, limit: float, fixed: float | None = None) -> None:
        self._clock, self._draw, self._limit, self._fixed = clock, draw, limit, fixed
        self.slow = 0.0
        self.hosts: dict[str, Host] = {}  # by address
        self._ends: dict[Host, dict[int, _End]] = {}
        self._accepted: dict[Host, int] = {}
        self._stalled: dict[_End, None] = {}

    def delay(self) -> float:
        """Of one message, in seconds."""
        if self._fixed is not None:
            return self._fixed
        more = self.slow * self._draw.random() if self.slow and self._draw.random() < 0.05 else 0.0
        return 0.0001 + 0.0015 * self._draw.random() + more

    def add(self, host: Host, address: str) -> None:
        """It listens there from now on."""
        self.hosts[address] = host
        self._ends[host], self._accepted[host] = {}, 0

    def reaches(self, one: Host, other: Host) -> bool:
        """Are these machines connected?"""
        return one.side == other.side

    # ---- connections

    def dial(self, host: Host, link: int, address: str) -> None:
        """Connect; `opened` or `closed` is called."""
        self._ends[host][link] = _End(host, link)
        self._clock.after(self.delay(), self._answer, host, link, address)

    def _answer(self, host: Host, link: int, address: str) -> None:
        end = self._ends[host].get(link)
        if end is None:
            return
        other = self.hosts.get(address)
        if (
            other is None
            or not (other.alive or other.answers)
            or not self.reaches(host, other)
            or other.frozen
        ):
            self._clock.after(self._limit, self._fail, end, Closed.SILENT)
        elif not other.alive:
            self._clock.after(self.delay(), self._fail, end, Closed.REFUSED)
        else:
            self._accepted[other] -= 1
            end.peer = peer = _End(other, self._accepted[other], end)
            self._ends[other][peer.link] = peer
            self._clock.after(self.delay(), self._opened, end)

    def _fail(self, end: _End, why: Closed) -> None:
        if self._ends[end.host].pop(end.link, None) is end:
            end.host.closed(end.link, why, "cannot be reached")

    def _opened(self, end: _End) -> None:
        if self._ends[end.host].get(end.link) is end:
            end.host.opened(end.link)

    def send(self, host: Host, link: int, message: Between | None) -> None:
        """On a connection; nothing happens if it has ended. None closes it."""
        end = self._ends[host].get(link)
        if end is None or end.peer is None:
            return
        if end.mute:  # nothing is acknowledged: the kernel gives up (TCP_USER_TIMEOUT)
            if not end.given_up:
                end.given_up = True
                self._clock.after(self._limit, self._fail, end, Closed.SILENT)
            return
        end.last = max(end.last, self._clock.now + self.delay())
        end.sent.append(message)
        self._clock.at(end.last, self._arrive, end)

    def _arrive(self, end: _End) -> None:
        assert end.peer is not None
        if not end.sent:
            return
        if not self.reaches(end.host, end.peer.host):
            self._stalled[end] = None
            return
        message = end.sent.popleft()
        host, link = end.peer.host, end.peer.link
        if self._ends[host].get(link) is not end.peer:
            return
        if message is None:
            del self._ends[host][link]
            host.closed(link, Closed.GONE, "closed by the peer")
        else:
            host.received(link, message)

    def hang_up(self, host: Host, link: int) -> None:
        """Close; what was sent before still arrives."""
        end = self._ends[host].get(link)
        if end is not None:
            self.send(host, link, None)
            del self._ends[host][link]

    # ---- faults

    def heal(self) -> None:
        """Machines have come together again: what was held back arrives."""
        for end in list(self._stalled):
            if end.peer is not None and self.reaches(end.host, end.peer.host):
                del self._stalled[end]
                for _ in end.sent:
                    end.last = max(end.last, self._clock.now + self.delay())
                    self._clock.at(end.last, self._arrive, end)

    def lose(self, host: Host, silent: bool) -> None:
        """The process has gone, or (silent) its whole machine."""
        for end in list(self._ends[host].values()):
            if silent or end.peer is None:
                end.mute = True
                end.sent.clear()
                if end.peer is not None:
                    end.peer.mute = True
            else:
                self.send(host, end.link, None)
        self._ends[host] = {}

    def links(self, host: Host) -> list[int]:
        """Its connections."""
        return [link for link, end in self._ends[host].items() if end.peer is not None]

    def cut(self, host: Host, link: int, silent: bool) -> None:
        """One connection breaks; both ends are told, each in its time, or (silent) neither."""
        end = self._ends[host].get(link)
        if end is None or end.peer is None:
            return
        for one in (end, end.peer):
            one.mute = True
            for _ in range(self._draw.randrange(len(one.sent) + 1)):
                one.sent.pop()
            if not silent:
                self._clock.after(self._draw.random() * self._limit / 2, self._broken, one)

    def _broken(self, end: _End) -> None:
        if self._ends[end.host].get(end.link) is end:
            del self._ends[end.host][end.link]
            end.host.closed(end.link, Closed.GONE, "connection reset")
