"""A ward and guardians on one loop, with real connections and files, and mirrors as a worker leaves them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.credentials import Tls
from checkpointless_elastic.agent.peers import Peer, Peers
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.agent.wards import Keeper, Wards
from checkpointless_elastic.protocol.between import Seated, decode
from checkpointless_elastic.protocol.guarding import Kept
from checkpointless_elastic.protocol.messages import Mirrored, Mismatch, Report, Stage
from checkpointless_elastic.state.pieces import Manifest
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.blocks import Block, Shared, Stripe
from checkpointless_elastic.worker.mirror import Entry, encode, path_of
from checkpointless_elastic.worker.private import slot_path
from tests.agent.meeting import identity

RANK = 2


class Guardian:
    """Keeps what it is sent. ``copied``: what it would tell the coordinator."""

    def __init__(self, loop: EventLoop, run_dir: Path, tls: Tls | None) -> None:
        run_dir.mkdir()
        self.copied: list[tuple[int, int, int]] = []
        self.keeper = Keeper(
            str(run_dir), lambda *_: True, lambda *what: self.copied.append(what), Bell(loop)
        )
        self.peers = Peers(
            loop,
            identity(tls),
            ("127.0.0.1", 0),
            opened=lambda peer: None,
            take=lambda peer, body: self.keeper.received(peer, decode(body)),
            closed=lambda peer, reason: None,
        )
        self.address = f"127.0.0.1:{self.peers.port}"

    def close(self) -> None:
        self.keeper.close()
        self.peers.close()


class Ward:
    """The agent of a seat with one rank."""

    def __init__(
        self, loop: EventLoop, run_dir: Path, guardian: str, tls: Tls | None, taken: bool = False
    ) -> None:
        run_dir.mkdir()
        self.run_dir = str(run_dir)
        self.fetched: Kept | None = None
        self.said: list[tuple[int, Report | Mismatch]] = []
        with Slot.create(slot_path(self.run_dir, RANK)) as slot:
            slot.write(b"private")
        self.peers = Peers(
            loop,
            identity(tls),
            ("127.0.0.1", 0),
            opened=lambda peer: self.wards.opened(peer),
            take=self._take,
            closed=lambda peer, reason: self.wards.closed(peer, reason),
        )
        self.wards = Wards(
            loop,
            Bell(loop),
            self.peers,
            self.run_dir,
            Seated(1, 1, [0, 2], 3, "", guardian, 1, 0, taken),
            frozenset({RANK}),
            self._fetched,
            lambda rank, report: self.said.append((rank, report)),
        )

    def _take(self, peer: Peer, body: bytes) -> None:
        self.wards.received(peer, decode(body))

    def _fetched(self, kept: Kept) -> None:
        self.fetched = kept

    def write(self, step: int, content: bytes, begun: int = 1) -> None:
        """Leave a mirror as the rank's worker does, and say so."""
        name = f"mirror-{RANK}-a-state-cpu"
        segment = Segment.share(Path(self.run_dir), name, len(content), 0, len(content))
        segment.memory()[:] = content
        stripe = Stripe(Block((RANK,), "cpu"), str(segment.path), [])
        shared = Shared((RANK,), Manifest((), b""), step, None, {}, [])
        self.list({step: encode(Entry(step, [stripe], shared, [], b"", {}, begun))})
        self.wards.heard(RANK, Mirrored(step, begun))

    def list(self, mirrors: dict[int, bytes]) -> None:
        """These mirrors are whole."""
        path = path_of(self.run_dir, RANK)
        with Slot.open(path) if os.path.exists(path) else Slot.create(path) as slot:
            slot.write(b"", mirrors)

    def ready(self, step: int, generation: int = 1) -> bool:
        """The rank is ready for a step. True: that is kept back."""
        return self.wards.heard(RANK, Report(Stage.READY, generation, step))

    def close(self) -> None:
        self.wards.close()
        self.peers.close()


class Scene:
    """Makes guardians and wards, and serves the loop."""

    def __init__(self, folder: Path, tls: list[Tls | None]) -> None:
        self.loop = EventLoop()
        self._folder, self._tls = folder, tls
        self._made: list[Any] = []

    def _next(self) -> tuple[Path, Tls | None]:
        number = len(self._made)
        return self._folder / f"node-{number}", self._tls[number % len(self._tls)]

    def guardian(self) -> Guardian:
        self._made.append(Guardian(self.loop, *self._next()))
        return self._made[-1]

    def ward(self, guardian: Guardian, taken: bool = False) -> Ward:
        run_dir, tls = self._next()
        self._made.append(Ward(self.loop, run_dir, guardian.address, tls, taken))
        return self._made[-1]

    def until(self, condition: Any, what: str) -> None:
        assert self.loop.run(condition, 20.0), what

    def close(self) -> None:
        for made in self._made:
            made.close()
        self.loop.close()


@contextmanager
def scene(folder: Path, tls: list[Tls | None]) -> Iterator[Scene]:
    made = Scene(folder, tls)
    try:
        yield made
    finally:
        made.close()
