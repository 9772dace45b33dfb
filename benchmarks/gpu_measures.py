"""What gpu_check measures beside the jobs: transfers between processes, and the abort of a hanging collective.

The same code runs on the CPU with gloo (BENCH_DEVICE=cpu, the default), where shared memory stands for CUDA IPC."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness.alone import Alone
from jobs import accelerator
from jobs.accelerator import KIND, LIMIT

from checkpointless_elastic.groups import Registry
from checkpointless_elastic.groups.spec import GroupSpec
from checkpointless_elastic.state.device import Opened, share
from checkpointless_elastic.state.pieces import PARAMETER, Piece, piece_of
from checkpointless_elastic.state.plan import PieceSize, Plan, plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.transfer import Receiver, in_segment, publish, vouch

PIECES = 4
HANG_S = 0.5
Body = Callable[..., None]


class Together:
    """Processes that each run one body; what they say comes back in order."""

    def __init__(self, bodies: list[tuple[Body, tuple[Any, ...]]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        for body, arguments in bodies:
            here, there = context.Pipe()
            process = context.Process(target=body, args=(*arguments, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def heard(self, number: int) -> Any:
        """The next word of one process. RuntimeError if it ends or says nothing."""
        if not self.pipes[number].poll(LIMIT.total_seconds()):
            raise RuntimeError(f"Process {number} said nothing for {LIMIT.total_seconds():g} s.")
        try:
            return self.pipes[number].recv()
        except EOFError as error:
            raise RuntimeError(f"Process {number} ended with an error, which stands above.") from error

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


# ---- from process to process: CUDA IPC, or shared memory


def make_pieces(mib: int, seed: int, device: torch.device) -> list[Piece]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(mib << 18, generator=generator).to(device) for _ in range(PIECES)]
    return [piece_of(f"piece{number}", PARAMETER, tensor) for number, tensor in enumerate(tensors)]


def layout_of(pieces: list[Piece]) -> Plan:
    return plan([PieceSize(piece.info.nbytes) for piece in pieces], [0])


def source(folder: str, mib: int, repeats: int, pipe: Connection) -> None:
    """Gives leave to read its pieces, or copies them to shared memory; keeps them until told."""
    pieces = make_pieces(mib, 0, accelerator.choose(0, 1))
    layout = layout_of(pieces)
    segment = None
    if KIND == "cpu":
        segment = Segment.share(Path(folder), "state", layout.segment_bytes, 0, layout.segment_bytes)
    for _ in range(repeats):
        started = time.perf_counter()
        if segment is None:
            pipe.send((vouch(pieces, layout, 0), share(pieces), time.perf_counter() - started))
        else:
            pipe.send((publish(pieces, layout, 0, segment), [], time.perf_counter() - started))
        pipe.recv()


def target(folder: str, mib: int, repeats: int, pipe: Connection) -> None:
    """Opens, copies and verifies, as worker/exchange.py does it; then copies the same bytes plainly on its device."""
    pieces = make_pieces(mib, 1, accelerator.choose(0, 1))
    layout = layout_of(pieces)
    for _ in range(repeats):
        digests, memory = pipe.recv()
        started = time.perf_counter()
        if memory:
            opened = Opened(memory)
            receiver = Receiver(pieces, layout, lambda _, chunk, opened=opened: opened.read(chunk))
            receive(receiver, digests)
            del opened, receiver
        else:
            with Segment.open(Path(folder) / "state", layout.segment_bytes) as segment:
                receive(Receiver(pieces, layout, in_segment(segment)), digests)
        pipe.send((time.perf_counter() - started, plain_copy(pieces)))


def receive(receiver: Receiver, digests: Any) -> None:
    receiver.receive(digests)
    receiver.finish()
    accelerator.settle()


def plain_copy(pieces: list[Piece]) -> float:
    copies = [torch.empty_like(piece.tensor) for piece in pieces]
    accelerator.settle()
    started = time.perf_counter()
    for copy, piece in zip(copies, pieces, strict=True):
        copy.copy_(piece.tensor)
    accelerator.settle()
    return time.perf_counter() - started


def process_to_process(mib: int, repeats: int) -> dict[str, object]:
    """Medians without the first round, in bytes per second."""
    nbytes = PIECES * mib << 20
    shared = Path("/dev/shm")
    rounds = []
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        jobs = [(body, (folder, mib, repeats + 1)) for body in (source, target)]
        with Together(jobs) as both:
            for _ in range(repeats + 1):
                digests, memory, published = both.heard(0)
                both.pipes[1].send((digests, memory))
                rounds.append((published, *both.heard(1)))
                both.pipes[0].send("read")
    names = ("digest" if KIND != "cpu" else "publish", "receive_and_verify", "plain_copy")
    rates = {
        name: nbytes / median(times) / 1e9
        for name, times in zip(names, zip(*rounds[1:], strict=True), strict=True)
    }
    way = "shared memory" if KIND == "cpu" else "CUDA IPC"
    return {"way": way, "pieces": PIECES, "piece_mib": mib, "gigabytes_per_second": rates}


# ---- by a broadcast


def broadcaster(path: str, rank: int, mib: int, repeats: int, pipe: Connection) -> None:
    device = accelerator.choose(rank, 2)
    group = accelerator.native_group(dist.FileStore(path, 2), rank, 2)
    data = torch.full((mib << 18,), float(rank), device=device)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    for _ in range(repeats):
        group.barrier().wait()
        accelerator.settle()
        started = time.perf_counter()
        group.broadcast([data], options).wait()
        accelerator.settle()
        pipe.send(time.perf_counter() - started)
    assert not data.any(), "the broadcast did not arrive"
    pipe.send("right")


def by_broadcast(mib: int, repeats: int) -> dict[str, object]:
    """One rank to another; the slower one's time counts, the first round does not."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(broadcaster, (f"{folder}/store", rank, mib, repeats + 1)) for rank in range(2)]
        with Together(jobs) as both:
            times = [max(both.heard(0), both.heard(1)) for _ in range(repeats + 1)]
            assert [both.heard(0), both.heard(1)] == ["right", "right"]
    rate = (mib << 20) / median(times[1:]) / 1e9
    return {"way": "gloo" if KIND == "cpu" else "NCCL", "mib": mib, "gigabytes_per_second": rate}


# ---- abort of a collective to which one rank does not come


def hanging(path: str, rank: int, ranks: int, pipe: Connection) -> None:
    """Says how long after the start of the abort this thread and its device were free again."""
    os.environ.update(
        TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"
    )  # as groups/patch.py does
    device = accelerator.choose(rank, ranks)
    host = Alone()
    registry = Registry(host, shadow=False)
    devices = (("cpu", "gloo"),) if KIND == "cpu" else (("cpu", "gloo"), ("cuda", "nccl"))
    spec = GroupSpec(
        "hanging", "", tuple(range(ranks)), rank, accelerator.backend(), devices, timedelta(seconds=60)
    )
    group = registry.create(spec, dist.FileStore(path, ranks))
    group.allreduce([torch.ones(1 << 20, device=device)]).wait()
    accelerator.settle()
    pipe.send("connected")
    if rank == ranks - 1:
        pipe.recv()
        return
    began: list[float] = []

    def abort() -> None:
        began.append(time.perf_counter())
        registry.abort(frozenset({ranks - 1}))
        began.append(time.perf_counter())
        host.frozen.set()

    threading.Timer(HANG_S, abort).start()
    data = torch.ones(1 << 20, device=device)
    group.allreduce([data]).wait()
    accelerator.settle()
    free = time.perf_counter()
    host.frozen.wait()
    if free < began[0]:
        raise RuntimeError("The collective ended before it was aborted, so nothing was measured.")
    torch.ones(8, device=device).sum().item()  # the device still works
    pipe.send((free - began[0], began[1] - began[0], bool(data.isfinite().all())))


def abort_latency(ranks: int, repeats: int) -> dict[str, object]:
    """Seconds of the slowest rank, by repeat."""
    latencies, calls = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            jobs = [(hanging, (f"{folder}/store", rank, ranks)) for rank in range(ranks)]
            with Together(jobs) as all_of_them:
                for rank in range(ranks):
                    all_of_them.heard(rank)
                found = [all_of_them.heard(rank) for rank in range(ranks - 1)]
        if not all(finite for *_, finite in found):
            raise RuntimeError("The output of an aborted collective is not finite.")
        latencies.append(max(latency for latency, *_ in found))
        calls.append(max(call for _, call, _ in found))
    return {
        "ranks": ranks,
        "seconds": latencies,
        "median_s": median(latencies),
        "call_median_s": median(calls),
    }
