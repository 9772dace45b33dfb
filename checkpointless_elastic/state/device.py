"""Memory of an accelerator that another process on the same machine opens: CUDA IPC, by torch's own handles.

Read in torch 2.13: `torch/multiprocessing/reductions.py`. A handle can be opened while the process that gave it lives.
torch counts the openings and keeps the memory until they are closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.pieces import Piece, byte_view
from checkpointless_elastic.state.plan import Chunk

__all__ = ["DeviceMemory", "Opened", "gathered", "shareable", "share"]


class DeviceMemory(msgspec.Struct, frozen=True):
    """The bytes of one piece in the memory of a device.

    Attributes:
        storage: what torch says of the allocation: device index, handle, bytes, offset, handle and offset of the count
            of openings, handle of an event, and whether that is to be waited for; None where there are no bytes.
        offset, nbytes: where in the storage the piece is.
    """

    storage: tuple[int, bytes, int, int, bytes, int, bytes, bool] | None
    offset: int
    nbytes: int


def shareable(pieces: Sequence[Piece]) -> bool:
    """Whether all these pieces can be opened by another process: dense, and on a CUDA device.

    Not in memory of `PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync`, which has no handles.
    """
    dense = all(piece.tensor.is_cuda and byte_view(piece.tensor) is not None for piece in pieces)
    return dense and (not pieces or torch.cuda.get_allocator_backend() == "native")


def share(pieces: Sequence[Piece]) -> list[DeviceMemory]:
    """What another process needs to open these pieces. They must not change or go until it has read them."""
    return [_share(piece) for piece in pieces]


def _share(piece: Piece) -> DeviceMemory:
    data = byte_view(piece.tensor)
    if data is None:
        raise StateMismatchError(
            f"{piece.key} has holes in its memory and cannot be opened by another process."
        )
    if not data.numel():
        return DeviceMemory(None, 0, 0)
    handle: Any = data.untyped_storage()
    return DeviceMemory(handle._share_cuda_(), int(data.storage_offset()), data.numel())


class Opened:
    """The pieces of one source, opened here; the mappings end with the object."""

    def __init__(self, memory: Sequence[DeviceMemory]) -> None:
        self._pieces = [_open(one) for one in memory]

    def read(self, chunk: Chunk) -> torch.Tensor:
        """The bytes of a chunk, on the device of the source."""
        return gathered(self._pieces, chunk)


def _open(memory: DeviceMemory) -> torch.Tensor:
    if memory.storage is None:
        return torch.empty(0, dtype=torch.uint8)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    storage = torch.UntypedStorage._new_shared_cuda(*memory.storage)
    data = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return data.set_(storage, memory.offset, (memory.nbytes,), (1,))


def gathered(pieces: Sequence[torch.Tensor], chunk: Chunk) -> torch.Tensor:
    """A chunk as a segment would have it, from the bytes of its pieces: a view where it lies in one, else a copy."""
    first = chunk.ranges[0]
    if len(chunk.ranges) == 1:
        return pieces[first.piece][first.offset : first.offset + first.length]
    result = torch.zeros(chunk.length, dtype=torch.uint8, device=pieces[first.piece].device)
    for part in chunk.ranges:
        begin = part.segment_offset - chunk.offset
        result[begin : begin + part.length] = pieces[part.piece][part.offset : part.offset + part.length]
    return result
