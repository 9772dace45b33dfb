"""Raw bytes of the tensors that forward writes, such as BatchNorm's running statistics: each rank has its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.pieces import Piece, carrier
from checkpointless_elastic.tensor_bytes import to_bytes


def read(pieces: Sequence[Piece]) -> dict[str, bytes]:
    """The bytes of each piece, by key. Waits for the device."""
    return {piece.key: to_bytes(carrier(piece.tensor)) for piece in pieces}


def write(pieces: Sequence[Piece], tensors: dict[str, bytes]) -> None:
    """Put bytes back into the pieces they belong to. Raises StateMismatchError for a key or size that does not fit."""
    by_key = {piece.key: piece for piece in pieces}
    for key, data in tensors.items():
        piece = by_key.get(key)
        if piece is None or piece.info.nbytes != len(data):
            raise StateMismatchError(f"{key} in the slot of this rank does not fit the model")
        cells = carrier(piece.tensor)
        with torch.no_grad():
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(cells.dtype)
            cells.copy_(flat.view(cells.shape))
