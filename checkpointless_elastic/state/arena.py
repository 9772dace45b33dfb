"""Memory for the tensors that a replacement must make before it can be filled: huge pages, where the kernel has them.

The first touch of fresh memory is what a small recovery spends most of its time on: 36 MiB of optimizer state took
30 to 60 ms in pages of 4 KiB and 3 to 11 ms in huge ones (2 cores, virtual machine, torch.empty against this). Each
tensor has a storage of its own, of its own size, so that saving or dropping one does not concern the others.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable

import torch

from checkpointless_elastic.state.pieces import PieceInfo, dtype_of
from checkpointless_elastic.state.plan import ALIGNMENT

__all__ = ["Arena"]

_log = logging.getLogger(__name__)
_WORTH_IT = 2 << 20


class Arena:
    """Anonymous memory of one process. A tensor keeps all of it mapped, but only touched pages exist."""

    def __init__(self, pieces: Iterable[PieceInfo]) -> None:
        self._size = sum(_aligned(info.nbytes) for info in pieces if info.device == "cpu")
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
        if self._map is None:
            self._map = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                _log.debug("This kernel has no huge pages (%s).", error)
        return self._map


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
