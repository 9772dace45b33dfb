"""Compares what two runs of a job wrote, bit for bit.

Tensors in .pt files (read with weights_only=True) and .safetensors files are compared by name, type, shape and bytes,
so that NaN equals NaN; every other file byte for byte, and so is a .pt file that weights_only=True does not read.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

__all__ = ["differences", "folders", "load", "matching"]

LARGEST_HEADER = 100 << 20  # bytes, as the format has it


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
    elif repr(left) != repr(right) if isinstance(left, float) else left != right:
        yield f"{where}: {left!r} against {right!r}"


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names, relative to the folder, of the files that any of these patterns has, sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in found)


def folders(left: Path, right: Path, patterns: Sequence[str]) -> list[str]:
    """One sentence for each place where the files of two folders differ; one that only one has is a difference."""
    here, there = matching(left, patterns), matching(right, patterns)
    found = [f"{name} is missing" for name in here if name not in there]
    found += [f"{name} should not be there" for name in there if name not in here]
    for name in sorted(set(here) & set(there)):
        found += _file(left / name, right / name, name)
    return found


def load(path: Path) -> object:
    """The content of a .pt file, on the CPU; raises what torch.load raises."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _file(left: Path, right: Path, name: str) -> Iterator[str]:
    if filecmp.cmp(left, right, shallow=False):
        return
    try:
        if left.suffix == ".pt":
            yield from differences(load(left), load(right), name)
            return
        if left.suffix == ".safetensors":
            yield from differences(_tensors(left), _tensors(right), name)
            return
    except Exception as error:  # a damaged file makes readers fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        yield f"{name}: not equal byte for byte, and it cannot be read ({reason})"
        return
    yield f"{name}: not equal byte for byte"


def _tensors(path: Path) -> dict[str, object]:
    """Type, shape and bytes by name, and metadata. The format: length of the header (8 bytes), JSON header, bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if length > min(LARGEST_HEADER, len(data)):
        raise ValueError(f"its header has {length} bytes")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    found: dict[str, object] = {"__metadata__": header.pop("__metadata__", {})}
    for name in sorted(header):
        start, stop = header[name]["data_offsets"]
        found[name] = [header[name]["dtype"], header[name]["shape"], _bytes(body[start:stop])]
    return found


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(a, b)
