"""The bytes of a tensor, without NumPy: torch runs without it, and so does what is built on torch alone."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["to_bytes"]


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a dense tensor in row order."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)
