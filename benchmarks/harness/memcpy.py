"""What a plain copy of bytes in memory takes on this machine, as the measure of a transfer through shared memory.

From shared memory to private memory, by Tensor.copy_, the pages of both made and mapped before."""

from __future__ import annotations

import mmap
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

PART = 4 << 20  # bytes that a thread copies at a time


def copy_seconds(source: Tensor, target: Tensor, threads: int = 1) -> float:
    """One copy of flat bytes. One thread takes them in one piece, several in parts."""
    started = perf_counter()
    if threads == 1:
        target.copy_(source)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(
                pool.map(
                    lambda pair: pair[1].copy_(pair[0]),
                    zip(source.split(PART), target.split(PART), strict=True),
                )
            )
    return perf_counter() - started


def shared_bytes(nbytes: int) -> Tensor:
    """Shared memory with its pages, filled."""
    folder = Path("/dev/shm")
    with tempfile.TemporaryFile(dir=folder if folder.is_dir() else None) as file:
        file.truncate(nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8).fill_(1)


def memcpy_bandwidth(nbytes: int, repeats: int = 5) -> float:
    """Bytes per second of a copy by one thread: median, the first one left out."""
    torch.set_num_threads(1)
    source, target = shared_bytes(nbytes), torch.ones(nbytes, dtype=torch.uint8)
    times = [copy_seconds(source, target) for _ in range(repeats + 1)]
    return nbytes / median(times[1:])
