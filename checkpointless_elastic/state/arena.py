"""Memory that a replacement will need, made while its script is set up.

The first touch of fresh memory is what a small recovery spends most of its time on: 40 MiB took 15 to 22 ms in pages
of 4 KiB, and 4 to 90 ms in huge ones (2 cores, virtual machine). So a thread makes it beside: another core is free
then, since the survivors wait. There are two kinds. The *arena* is for tensors that the replacement makes itself before
it can be filled; each has a storage of its own, of its own size, so that saving or dropping one does not concern the
others. The *heap* is for what the script allocates: parameters, and later gradients and DDP's buckets.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

import torch

from checkpointless_elastic.state.pieces import PieceInfo, dtype_of
from checkpointless_elastic.state.plan import ALIGNMENT

__all__ = ["Arena", "forget", "prepare", "size_of"]

_WORTH_IT = 2 << 20
_STRETCH = 4 << 20  # touched in one call, so that other threads can map memory in between
_BLOCK = 16 << 20  # of the heap
_MMAP_THRESHOLD = (
    32 << 20
)  # larger blocks are mapped anew each time: the most that glibc goes up to by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_INT_MAX = 2**31 - 1
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_prepared: mmap.mmap | None = None


def prepare(arena: int, heap: int) -> Callable[[], None]:
    """Get so many bytes of each kind, and return what creates their pages: to be called on a thread beside."""
    global _prepared
    stretches = _free_heap(heap) if heap >= _WORTH_IT else []
    if arena >= _WORTH_IT:
        _prepared = _anonymous(arena)
        stretches.append((ctypes.addressof(ctypes.c_char.from_buffer(_prepared)), arena))
    return functools.partial(
        _touch, stretches, _prepared
    )  # holds the mapping, whose addresses stay its own then


def forget() -> None:
    """The script is run again: nothing is to be received into what was prepared."""
    global _prepared
    _prepared = None


def _free_heap(nbytes: int) -> list[tuple[int, int]]:
    """Address and length of free memory that this thread's next allocations are taken from.

    glibc gives memory at the end of its heap back to the kernel, and maps large blocks anew each time; it stops doing
    so by itself once large blocks have been freed, as those of a training step are. Elsewhere there is nothing to set.
    """
    if not hasattr(_libc, "mallopt"):
        return []
    _libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    _libc.mallopt(_M_TRIM_THRESHOLD, min(2 * max(nbytes, _MMAP_THRESHOLD), _INT_MAX))
    blocks = [ctypes.c_void_p(_libc.malloc(_BLOCK)) for _ in range(-(-nbytes // _BLOCK))]
    for block in blocks:
        _libc.free(block)
    return [(block.value, _BLOCK) for block in blocks if block.value]


def _touch(stretches: list[tuple[int, int]], held: mmap.mmap | None) -> None:
    """Create all pages; what is in them stays. A kernel before 5.14 cannot: pages come as they are used."""
    for start, length in stretches:
        for offset in range(0, length, _STRETCH):
            part = min(_STRETCH, length - offset)
            first = (start + offset) // mmap.PAGESIZE * mmap.PAGESIZE
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(part), _MADV_POPULATE_WRITE)


def size_of(pieces: Iterable[PieceInfo]) -> int:
    """Bytes of an arena for these pieces."""
    return sum(_aligned(info.nbytes) for info in pieces if info.device == "cpu")


def _anonymous(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Arena:
    """Anonymous memory of one process. A tensor keeps all of it mapped, but only touched pages exist."""

    def __init__(self, pieces: Iterable[PieceInfo]) -> None:
        self._size = size_of(pieces)
        self._used = 0
        self._map: mmap.mmap | None = None

    def tensor(self, info: PieceInfo) -> torch.Tensor | None:
        """A tensor as described, with undefined content; None where there is no room or nothing to gain."""
        end = self._used + _aligned(info.nbytes)
        if self._size < _WORTH_IT or not info.nbytes or end > self._size:
            return None
        data = torch.frombuffer(self._memory(), dtype=torch.uint8, count=info.nbytes, offset=self._used)
        self._used = end
        empty = torch.empty(0, dtype=dtype_of(info))
        return empty.set_(data.untyped_storage(), 0, info.shape, info.stride)

    def _memory(self) -> mmap.mmap:
        global _prepared
        if self._map is None:
            fits = _prepared is not None and len(_prepared) >= self._size
            self._map = _prepared if fits else _anonymous(self._size)
            _prepared = None
        assert self._map is not None
        return self._map


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
