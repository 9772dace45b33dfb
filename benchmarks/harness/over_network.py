"""How fast does state come back from another node, beside a plain send of the same bytes?

Some processes stand for survivors of other nodes and one for the replacement. They meet through the loopback device,
which is as fast as the processors: what a copy or a check costs shows here as on no real network. Three are timed in
the replacement, in turns, each with a group of gloo connected for it, as in a recovery:

    plain_send   each survivor's stripe in one message, to where it is read; nothing is checked or copied further
    receive      as in a recovery: chunks of 4 MiB, copied into the tensors and verified while others arrive
    one_by_one   the same, but nothing is copied and verified before all has arrived
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch.distributed import FileStore

from checkpointless_elastic.groups import Registry
from checkpointless_elastic.state.pieces import PARAMETER, Piece, piece_of
from checkpointless_elastic.state.plan import Chunk
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import EVERYBODY
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver, in_segment, vouch
from checkpointless_elastic.worker.blocks import Block, layout_of
from checkpointless_elastic.worker.network import Network, receive, send
from checkpointless_elastic.worker.routes import Route
from harness.alone import Alone

__all__ = ["WAYS", "measure", "report_of"]

WAYS = ("plain_send", "receive", "one_by_one")
BLOCK = Block(EVERYBODY, "cpu")
LIMIT_S = 120.0


def _pieces(count: int, mib: int, seed: int) -> list[Piece]:
    numbers = [torch.full((mib << 18,), float(seed + number)) for number in range(count)]
    return [piece_of(f"piece{number}", PARAMETER, tensor) for number, tensor in enumerate(numbers)]


class _Rank:
    """One process: survivors are 0 to ``sources`` - 1, the replacement comes after them."""

    def __init__(self, rank: int, sources: int, count: int, mib: int, folder: str) -> None:
        torch.set_num_threads(1)
        self.rank, self.sources = rank, tuple(range(sources))
        self.pieces = _pieces(count, mib, seed=1 if rank < sources else 100)
        self.layout = layout_of(self.pieces, self.sources)
        self.segment = Segment.create(Path(folder), f"rank-{rank}", self.layout.segment_bytes)
        self.segment.populate(write=True)
        self._registry, self._store = Registry(Alone(), shadow=False), FileStore(f"{folder}/store", -1)
        self._turn = 0

    def network(self) -> Network:
        """Another generation each time, so that members meet anew."""
        self._turn += 1
        return Network(self._registry, lambda: self._store, self._turn, self.rank)

    @property
    def route(self) -> Route:
        return Route(BLOCK, 1, self.sources, (len(self.sources),), True)

    def stripe(self, source: int) -> torch.Tensor:
        """Its bytes in the segment."""
        ranges = self.layout.stripes[source]
        return self.segment.bytes[ranges[0].segment_offset : ranges[-1].segment_offset + ranges[-1].length]

    def send_plain(self) -> None:
        with self.network().peers(self.route.members) as peers:
            peers.send(self.stripe(self.rank), self.route.receiver)
            peers.finish()

    def receive_plain(self) -> None:
        with self.network().peers(self.route.members) as peers:
            for source in self.sources:
                peers.receive(self.stripe(source), source)
            peers.finish()

    def receive(self, said: Sequence[ChunkDigest], beside: bool) -> None:
        """As worker/exchange.py does it; without ``beside`` chunks are taken when all are there."""
        receiver = Receiver(self.pieces, self.layout, in_segment(self.segment))
        with receiver.taking(said) as take:
            waiting: list[tuple[int, Chunk]] = []

            def took(block: Block, source: int, chunk: Chunk) -> None:
                take(source, chunk) if beside else waiting.append((source, chunk))

            receive(self.network(), [self.route], {BLOCK: self.pieces}, {BLOCK: self.segment}, took)
            for source, chunk in waiting:
                take(source, chunk)
        receiver.finish()


def _survivor(pipe: Connection, *arguments: object) -> None:
    me = _Rank(*arguments)  # type: ignore[arg-type]
    pipe.send(vouch(me.pieces, me.layout, me.rank))
    while way := pipe.recv():
        me.send_plain() if way == "plain_send" else send(me.network(), [me.route], {BLOCK: me.pieces})


def _replacement(pipe: Connection, *arguments: object) -> None:
    """Answers each way with its seconds, and at the end with whether all bytes are right."""
    me, said = _Rank(*arguments), pipe.recv()  # type: ignore[arg-type]
    while way := pipe.recv():
        started = perf_counter()
        me.receive_plain() if way == "plain_send" else me.receive(said, way == "receive")
        pipe.send(perf_counter() - started)
    expected = _pieces(len(me.pieces), me.pieces[0].info.nbytes >> 20, seed=1)
    pipe.send(all(torch.equal(one.tensor, two.tensor) for one, two in zip(me.pieces, expected, strict=True)))


def measure(count: int, mib: int, sources: int, repeats: int) -> list[dict[str, float]]:
    """Seconds of each way, by round; the first round is left out."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(prefix="transfer-", dir=shared if shared.is_dir() else None) as folder:
        jobs = [(_survivor, (rank, sources, count, mib, folder)) for rank in range(sources)]
        with _processes([*jobs, (_replacement, (sources, sources, count, mib, folder))]) as pipes:
            pipes[-1].send([item for pipe in pipes[:-1] for item in _heard(pipe)])
            rounds = [{way: _timed(pipes, way) for way in WAYS} for _ in range(repeats + 1)]
            for pipe in pipes:
                pipe.send("")
            if not _heard(pipes[-1]):
                raise RuntimeError("The replacement's tensors are not those of the survivors.")
    return rounds[1:]


def _timed(pipes: Sequence[Connection], way: str) -> float:
    for pipe in pipes:
        pipe.send(way)
    seconds: float = _heard(pipes[-1])
    return seconds


def _heard(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT_S):
        raise TimeoutError(f"A process said nothing for {LIMIT_S:g} s.")
    return pipe.recv()


@contextmanager
def _processes(jobs: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> Iterator[list[Connection]]:
    """Each body in a process of its own, with a pipe to it; they have ended afterwards."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for body, arguments in jobs:
            here, there = context.Pipe()
            process = context.Process(target=body, args=(there, *arguments), daemon=True)
            process.start()
            stack.callback(process.join, LIMIT_S)
            there.close()
            pipes.append(here)
        try:
            yield pipes
        finally:
            for pipe in pipes:
                pipe.close()


def report_of(rounds: list[dict[str, float]], nbytes: int) -> dict[str, object]:
    """Rates in 10^9 bytes per second, and shares of the rate of a plain send."""
    return {
        "gigabytes_per_second": {way: nbytes / median(r[way] for r in rounds) / 1e9 for way in WAYS},
        "receive_vs_plain_send": median(r["plain_send"] / r["receive"] for r in rounds),
        "one_by_one_vs_plain_send": median(r["plain_send"] / r["one_by_one"] for r in rounds),
        "rounds": rounds,
    }
