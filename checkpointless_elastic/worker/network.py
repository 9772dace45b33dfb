"""State over the network: sources send their stripes to one rank of each node that has lost all that it held of them.

That rank receives into a segment, and tells the other lost ranks of its node where it is. All ranks of a route meet in
a native group of gloo made for it, which a newer generation ends at once; state of an accelerator goes through host
memory. The receiver takes chunks from all sources at a time, and the bytes arrive where they are read: in the segment.
While some chunks are on their way, those that have arrived are copied and verified.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import Store

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.groups.link import Link
from checkpointless_elastic.groups.registry import Registry
from checkpointless_elastic.groups.spec import GroupSpec
from checkpointless_elastic.state.pieces import Piece
from checkpointless_elastic.state.plan import Chunk, chunks
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.transfer import contents
from checkpointless_elastic.tensor_bytes import to_bytes
from checkpointless_elastic.worker.blocks import Block, layout_of
from checkpointless_elastic.worker.routes import Route, by_members

__all__ = ["Network", "receive", "send"]

LIMIT = timedelta(hours=1)
"""For one operation of a group; the agent's join_timeout ends a transfer that stands still much earlier."""
WINDOW = 4
"""Chunks under way between two ranks."""
_PATH_BYTES = 4096

Pieces = dict[Block, list[Piece]]


class Network(NamedTuple):
    """How this rank meets its peers in a generation.

    Attributes:
        registry: makes the groups.
        store: where members meet; opened when it is needed.
        generation: a newer one ends everything.
        rank: this one.
    """

    registry: Registry
    store: Callable[[], Store]
    generation: int
    rank: int

    @contextmanager
    def peers(self, members: tuple[int, ...]) -> Iterator[_Peers]:
        """The members, connected. Blocks until they have all come; raises `groups.Superseded`."""
        link = self.registry.connect_beside(_spec(members, self.rank), self.store(), self.generation)
        try:
            yield _Peers(link, members)
        except BaseException:
            self.registry.let_go(link, failed=True)
            raise
        self.registry.let_go(link)


class _Peers:
    """Sends and receives that are under way at the same time. A lost peer or a newer generation: RuntimeError."""

    def __init__(self, link: Link, members: tuple[int, ...]) -> None:
        self._link, self._members = link, members
        self._window = WINDOW * (len(members) - 1)
        self._under_way: deque[tuple[Any, torch.Tensor, Callable[[], None] | None]] = deque()

    def send(self, data: torch.Tensor, to: int) -> None:
        """Bytes in host memory, which must not change until `finish`."""
        self._begin(self._link.native.send([data], self._members.index(to), 0), data)

    def receive(self, data: torch.Tensor, source: int, then: Callable[[], None] | None = None) -> None:
        """Into these bytes, which are there when `then` is called, and after `finish`."""
        self._begin(self._link.native.recv([data], self._members.index(source), 0), data, then)

    def _begin(self, work: Any, data: torch.Tensor, then: Callable[[], None] | None = None) -> None:
        self._link.track(work)
        self._under_way.append((work, data, then))
        if len(self._under_way) > self._window:
            self._wait()

    def _wait(self) -> None:
        work, _, then = self._under_way[0]
        self._link.wait(work)
        self._link.in_flight.discard(work)  # a second wait would be for a second message
        self._under_way.popleft()
        if then:
            then()

    def finish(self) -> None:
        """Wait for all that is under way."""
        while self._under_way:
            self._wait()


def _spec(members: tuple[int, ...], rank: int) -> GroupSpec:
    name = f"transfer-{hashlib.blake2s(repr(members).encode(), digest_size=8).hexdigest()}"
    own = members.index(rank)
    return GroupSpec(name, "transfer of state", members, own, "gloo", (("cpu", "gloo"),), LIMIT)


def send(network: Network, found: Sequence[Route], pieces: Pieces) -> None:
    """Send this rank's stripes of all routes over the network. Blocks until they have arrived."""
    for members, routes in by_members(found, network.rank).items():
        with network.peers(members) as peers:
            for route in routes:
                _send(peers, route, pieces[route.block], network.rank)
            peers.finish()


def _send(peers: _Peers, route: Route, pieces: list[Piece], rank: int) -> None:
    for _, data in contents(pieces, layout_of(pieces, route.sources), rank):
        peers.send(data.cpu(), route.receiver)


def receive(
    network: Network,
    found: Sequence[Route],
    pieces: Pieces,
    rooms: Mapping[Block, Segment],
    take: Callable[[Block, int, Chunk], None],
) -> dict[Block, Segment]:
    """The blocks of all routes over the network, in segments of this node. Blocks until they are there, unverified.

    ``rooms``: the segments that this rank fills for its node. ``take(block, source, chunk)`` is called as soon as a
    chunk stands in one of them, while the next ones are on their way; so it should not take long.
    """
    arrived = {}
    for members, routes in by_members(found, network.rank).items():
        with network.peers(members) as peers:
            for route in routes:
                nbytes = layout_of(pieces[route.block], route.sources).segment_bytes
                if route.receiver == network.rank:
                    segment = rooms[route.block]
                    _receive(peers, route, pieces[route.block], segment, partial(take, route.block))
                    _tell(peers, route, segment)
                else:
                    segment = _hear(peers, route, nbytes)
                arrived[route.block] = segment
    return arrived


def _receive(
    peers: _Peers, route: Route, pieces: list[Piece], segment: Segment, take: Callable[[int, Chunk], None]
) -> None:
    layout = layout_of(pieces, route.sources)
    parts = [chunks(layout.stripes.get(source, ())) for source in route.sources]
    for turn in zip_longest(*parts):
        for source, chunk in zip(route.sources, turn, strict=True):
            if chunk is not None:
                data = segment.bytes[chunk.offset : chunk.offset + chunk.length]
                peers.receive(data, source, partial(take, source, chunk))
    peers.finish()


def _tell(peers: _Peers, route: Route, segment: Segment) -> None:
    path = str(segment.path).encode()
    if len(path) > _PATH_BYTES:
        raise StateMismatchError(f"the path {segment.path} has more than {_PATH_BYTES} bytes")
    data = torch.frombuffer(bytearray(path.ljust(_PATH_BYTES, b"\0")), dtype=torch.uint8)
    for reader in route.readers[1:]:
        peers.send(data, reader)
    peers.finish()


def _hear(peers: _Peers, route: Route, nbytes: int) -> Segment:
    data = torch.zeros(_PATH_BYTES, dtype=torch.uint8)
    peers.receive(data, route.receiver)
    peers.finish()
    return Segment.open(Path(to_bytes(data).rstrip(b"\0").decode()), nbytes)
