"""A piece of state: one live tensor, or this rank's part of one, its description, and its bytes as they travel.

A piece travels as raw bytes in the order of its memory ("carrier"): dimensions sorted by stride, dimensions of stride
zero (expanded) sent once. A dense tensor of any memory format is therefore copied without a detour. A tensor with
holes (a slice of a larger one) is gathered into a temporary copy first.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.sharding import EVERYBODY, Ranks, Sharding, local, sharding

__all__ = [
    "Manifest",
    "Piece",
    "PieceInfo",
    "byte_view",
    "carrier",
    "describe",
    "dtype_of",
    "gradient_key",
    "is_gradient",
    "make_tensor",
    "normal_strides",
    "piece_of",
]

PARAMETER = "parameter"
BUFFER = "buffer"
GRADIENT = "gradient"
OPTIMIZER = "optimizer"
OBJECT = "object"
MADE = (OPTIMIZER, GRADIENT)  # by a replacement, where its script has not made them
STILL = (PARAMETER, OPTIMIZER)  # do not change before the first optimizer step
_GRADIENT_SUFFIX = ":grad"
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def gradient_key(parameter: str) -> str:
    """The key of a parameter's gradient."""
    return parameter + _GRADIENT_SUFFIX


def is_gradient(key: str) -> bool:
    """Whether a key is that of a gradient."""
    return key.endswith(_GRADIENT_SUFFIX)


class PieceInfo(msgspec.Struct, frozen=True):
    """What a replacement must know to make the tensor: equal on every replica.

    Attributes:
        key: name, built from the names given to `Run` and the path inside the object.
        role: parameter, buffer, gradient, optimizer or object.
        dtype: as torch prints it, without the prefix: "float32".
        device: type of the device only ("cpu", "cuda"): the index differs between ranks.
        shape: the tensor's shape.
        stride: strides of a tensor of this shape and memory order without holes; zero for expanded dimensions.
        nbytes: bytes that travel.
        replicas: the ranks that hold the same bytes, EVERYBODY for all.
        sharding: what makes a DTensor of it, where it is the local part of one.
    """

    key: str
    role: str
    dtype: str
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int
    replicas: Ranks = EVERYBODY
    sharding: Sharding | None = None


class Manifest(msgspec.Struct, frozen=True):
    """Everything but the tensors' bytes: sent by one survivor, adopted by the replacement.

    Attributes:
        pieces: all pieces, in the order of the survivors' inventory.
        meta: state that is not a tensor, by torch.save; read only by torch.load(weights_only=True).
    """

    pieces: tuple[PieceInfo, ...]
    meta: bytes


@dataclass(frozen=True, eq=False)
class Piece:
    """One live tensor of the Run's objects; it is read and written in place.

    Attributes:
        info: its description.
        tensor: the memory that this rank has of it.
        outer: the tensor that the objects hold: the same one, or the DTensor that `tensor` is the local part of.
    """

    info: PieceInfo
    tensor: torch.Tensor
    outer: torch.Tensor

    @property
    def key(self) -> str:
        """The piece's name, equal on all ranks."""
        return self.info.key


def normal_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides that a tensor of the same shape and memory order has when it has no holes; 0 where expanded."""
    result = [0] * tensor.dim()
    step = 1
    for dim in reversed(_memory_order(tensor)):
        if tensor.stride(dim) == 0 and tensor.size(dim) != 1:
            continue
        result[dim] = step
        step *= max(tensor.size(dim), 1)
    return tuple(result)


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions, slowest first. Those of size 1 have no order of their own and stand where they are."""
    big = [dim for dim in range(tensor.dim()) if tensor.size(dim) != 1]
    strides = tensor.stride()
    in_order = iter(sorted(big, key=lambda dim: -strides[dim]))
    return [dim if tensor.size(dim) == 1 else next(in_order) for dim in range(tensor.dim())]


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """A detached view that holds each memory cell of the tensor once, slowest dimension first."""
    view = tensor.detach()
    if view.is_conj():
        view = view.conj()
    for dim in range(view.dim()):
        if view.stride(dim) == 0 and view.size(dim) > 1:
            view = view.narrow(dim, 0, 1)
    return view.permute(_memory_order(tensor)) if view.dim() > 1 else view


def byte_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor's live bytes as a flat uint8 view, or None if its memory has holes."""
    view = carrier(tensor)
    return view.view(-1).view(torch.uint8) if view.is_contiguous() else None


def piece_of(key: str, role: str, tensor: torch.Tensor, replicas: Ranks = EVERYBODY) -> Piece:
    """The piece that is this tensor. Raises as `describe` does."""
    return Piece(describe(key, role, tensor, replicas), local(tensor), tensor)


def describe(key: str, role: str, outer: torch.Tensor, replicas: Ranks = EVERYBODY) -> PieceInfo:
    """The description of a tensor, or StateMismatchError if tensors of its kind cannot be brought back."""
    tensor = local(outer)
    if (
        type(tensor) not in _PLAIN_TYPES
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_meta
    ):
        why = _why_not(tensor)
        if why:
            raise StateMismatchError(
                f"{key} cannot be protected: it is {why}; leave it out of Run(...) or make it plain."
            )
    shape = tuple(tensor.shape)
    strides = _dense(shape) if tensor.is_contiguous() else normal_strides(tensor)
    cells = tensor.numel() if 0 not in strides else carrier(tensor).numel()
    dtype = str(tensor.dtype).removeprefix("torch.")
    nbytes = cells * tensor.element_size()
    device = tensor.device.type
    return PieceInfo(key, role, dtype, device, shape, strides, nbytes, replicas, sharding(outer))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, one way to write those of dimensions of size 1."""
    result = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        result[dim - 1] = result[dim] * max(shape[dim], 1)
    return tuple(result)


def _why_not(tensor: torch.Tensor) -> str:
    """The reason why a tensor has no plain bytes, empty if it has."""
    if is_traceable_wrapper_subclass(tensor):
        return f"a tensor subclass ({type(tensor).__name__})"
    if torch.nn.parameter.is_lazy(tensor):
        return "a lazy parameter without a shape (run one forward first)"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return f"of layout {tensor.layout}"
    return "on the meta device" if tensor.device.type == "meta" else ""


def dtype_of(info: PieceInfo) -> torch.dtype:
    """The dtype of a piece, or StateMismatchError if this torch does not have it."""
    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise StateMismatchError(f"{info.key} has dtype {info.dtype}, which this torch does not know.")
    return dtype


def make_tensor(info: PieceInfo, device: torch.device) -> torch.Tensor:
    """A new tensor as described, with undefined content. Draws no random numbers."""
    return torch.empty_strided(info.shape, info.stride, dtype=dtype_of(info), device=device)
