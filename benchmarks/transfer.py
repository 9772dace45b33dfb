"""How fast does state come back through shared memory, beside a plain copy of the same bytes?

Some processes stand for survivors and one for the replacement. As in a recovery, each survivor copies its stripe
into the segment and digests it; the replacement then copies all stripes into its own tensors, verifying each
chunk of 4 MiB. What is compared is the replacement's part: bytes per second while bytes are copied *and*
verified, divided by those of a plain copy in the same process.

The plain copy is Tensor.copy_ from the same shared memory to the same private tensors. All pages exist and are mapped
beforehand, as a replacement has those of up to 1 GiB of state. It is made twice: by one thread in one call for each
piece, and by as many threads as the replacement uses. The three alternate.

--network N also measures N rounds of the way from other nodes, over gloo; see harness/over_network.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from harness import over_network
from harness.memcpy import copy_seconds
from harness.report import Bar, print_bars, write_json

from checkpointless_elastic.observe.machine import provenance
from checkpointless_elastic.state.pieces import PARAMETER, Piece, piece_of
from checkpointless_elastic.state.plan import PieceSize, Plan, plan
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.transfer import ChunkDigest, _threads, publish, restore

NAME = "state"


def make_pieces(count: int, mib: int, seed: int) -> list[Piece]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(mib << 18, generator=generator) for _ in range(count)]
    return [piece_of(f"piece{number}", PARAMETER, tensor) for number, tensor in enumerate(tensors)]


def layout_of(pieces: Sequence[Piece], sources: int) -> Plan:
    return plan([PieceSize(piece.info.nbytes) for piece in pieces], range(sources))


def survivor(rank: int, options: argparse.Namespace, folder: str, pipe: Connection) -> None:
    """Publishes its stripe whenever it is asked to, until the question is False."""
    torch.set_num_threads(1)
    pieces = make_pieces(options.pieces, options.mib, seed=0)
    layout = layout_of(pieces, options.sources)
    total = layout.segment_bytes
    low, high = total * rank // options.sources, total * (rank + 1) // options.sources
    segment = Segment.share(Path(folder), NAME, total, low, high - low)
    segment.populate(write=True)
    while pipe.recv():
        started = perf_counter()
        digests = publish(pieces, layout, rank, segment)
        pipe.send((digests, perf_counter() - started))


def replacement(options: argparse.Namespace, folder: str, pipe: Connection) -> None:
    """Receives, and copies plainly; answers each list of digests with the seconds of the three."""
    torch.set_num_threads(1)
    pieces = make_pieces(options.pieces, options.mib, seed=1)
    layout = layout_of(pieces, options.sources)
    segment = None
    while digests := pipe.recv():
        if segment is None:
            segment = Segment.open(Path(folder) / NAME, layout.segment_bytes)
            segment.populate()
        received = receive(pieces, layout, segment, digests)
        pipe.send((received, plain(pieces, segment, 1), plain(pieces, segment, _threads())))


def receive(
    pieces: list[Piece], layout: Plan, segment: Segment, digests: dict[int, list[ChunkDigest]]
) -> float:
    """As worker/exchange.py does it."""
    promised = [item for stripe in digests.values() for item in stripe]
    return restore(pieces, layout, segment, promised).seconds


def plain(pieces: list[Piece], segment: Segment, threads: int) -> float:
    parts = segment.bytes.split(pieces[0].info.nbytes)
    targets = [piece.tensor.view(torch.uint8) for piece in pieces]
    return sum(copy_seconds(part, target, threads) for part, target in zip(parts, targets, strict=True))


def measure(options: argparse.Namespace, folder: str) -> list[dict[str, float]]:
    """Seconds of each round; the first one is left out."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    jobs = [(survivor, (rank, options, folder)) for rank in range(options.sources)]
    for body, arguments in [*jobs, (replacement, (options, folder))]:
        here, there = context.Pipe()
        process: SpawnProcess = context.Process(target=body, args=(*arguments, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    rounds = [one_round(pipes[:-1], pipes[-1]) for _ in range(options.repeats + 1)]
    for pipe in pipes:
        pipe.send(False)
    for process in processes:
        process.join()
    return rounds[1:]


def one_round(survivors: Sequence[Connection], target: Connection) -> dict[str, float]:
    for pipe in survivors:
        pipe.send(True)
    answers = [pipe.recv() for pipe in survivors]
    target.send({rank: digests for rank, (digests, _) in enumerate(answers)})
    received, one, same = target.recv()
    return {"publish": max(s for _, s in answers), "receive": received, "memcpy_1": one, "memcpy_n": same}


def report_of(options: argparse.Namespace, rounds: list[dict[str, float]]) -> dict[str, object]:
    nbytes = options.pieces * options.mib << 20
    rates = {name: nbytes / median(r[name] for r in rounds) / 1e9 for name in rounds[0]}
    return {
        "bandwidth_vs_memcpy": median(r["memcpy_1"] / r["receive"] for r in rounds),
        "bandwidth_vs_memcpy_same_threads": median(r["memcpy_n"] / r["receive"] for r in rounds),
        "gigabytes_per_second": rates,
        "threads": _threads(),
        "pieces": options.pieces,
        "piece_mib": options.mib,
        "sources": options.sources,
        "rounds": rounds,
        **provenance(),
    }


def network(options: argparse.Namespace) -> dict[str, object]:
    """The report of the way over the network, printed too."""
    rounds = over_network.measure(options.pieces, options.mib, options.sources, options.network)
    report = over_network.report_of(rounds, options.pieces * options.mib << 20)
    rates = report["gigabytes_per_second"]
    assert isinstance(rates, dict)
    print("over gloo:", ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()))
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--mib", type=int, default=64, help="of how many MiB each (default 64)")
    parser.add_argument("--sources", type=int, default=2, help="survivors that hold them (default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--network", type=int, default=0, metavar="N", help="rounds over gloo (default 0)")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="transfer-", dir=shared if shared.is_dir() else None) as folder:
        report = report_of(options, measure(options, folder))
    rates = report["gigabytes_per_second"]
    assert isinstance(rates, dict)
    print(", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    beside = float(str(report["bandwidth_vs_memcpy_same_threads"]))
    print(f"received and verified, of a plain copy by the same {report['threads']} threads: {beside:.2f}")
    name = f"received and verified, of a plain copy, {options.pieces} pieces of {options.mib} MiB"
    print_bars([Bar(name, float(str(report["bandwidth_vs_memcpy"])), 0.7, at_least=True)])
    if options.network:
        report["network"] = network(options)
    write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
