"""Compares what two jobs ended with, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


def differences(left: object, right: object, where: str = "state") -> Iterator[str]:
    """One sentence for each place where two nested states differ; tensors by their bytes, so NaN equals
    NaN."""
    if type(left) is not type(right):
        yield f"{where}: {type(left).__name__} against {type(right).__name__}"
    elif isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if not _same_bits(left, right):
            yield f"{where}: tensors differ"
    elif isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            yield f"{where}: keys differ"
        for key in left.keys() & right.keys():
            yield from differences(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            yield f"{where}: {len(left)} items against {len(right)}"
        for index, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from differences(one, other, f"{where}.{index}")
    elif left != right:
        yield f"{where}: {left!r} against {right!r}"


def folder_differences(left: Path, right: Path, ranks: int) -> list[str]:
    """Where the final-<rank>.pt files of two jobs differ; a missing file is a difference."""
    found: list[str] = []
    for rank in range(ranks):
        name = f"final-{rank}.pt"
        missing = [str(folder) for folder in (left, right) if not (folder / name).exists()]
        if missing:
            found += [f"{folder} has no {name}" for folder in missing]
        else:
            found += differences(_load(left / name), _load(right / name), f"rank {rank}")
    return found


def _load(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(a, b)
