"""Return values of replayable functions as bytes: numbers, strings, tensors and containers of them. No pickle."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from checkpointless_elastic.tensor_bytes import to_bytes

MAX_VALUE = 1 << 20

_TENSOR, _TUPLE, _DICT = 1, 2, 3
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Unkeepable(TypeError):
    """Raised when a value is of a kind, or of a size, that is not kept."""


def encode_value(value: Any) -> bytes | None:
    """The value as bytes, None if it is over MAX_VALUE or of a kind that is not kept."""
    try:
        data = msgspec.msgpack.encode(_pack(value))
    except (Unkeepable, OverflowError):
        return None
    return data if len(data) <= MAX_VALUE else None


def decode_value(data: bytes) -> Any:
    """What was encoded. Tensors come without a graph, on the current device of the kind that they were on.

    Not by its number: what a twin of this rank encoded was on the twin's device.
    """
    return _unpack(msgspec.msgpack.decode(data, ext_hook=_Ext))


class _Ext:
    def __init__(self, code: int, data: memoryview) -> None:
        self.code, self.data = code, bytes(data)


def _pack(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value)
    if type(value) is list:
        return [_pack(item) for item in value]
    if type(value) is tuple:
        return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode([_pack(item) for item in value]))
    if type(value) is dict:
        items = [[_pack(key), _pack(item)] for key, item in value.items()]
        return msgspec.msgpack.Ext(_DICT, msgspec.msgpack.encode(items))
    raise Unkeepable(type(value).__name__)


def _pack_tensor(tensor: torch.Tensor) -> msgspec.msgpack.Ext:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise Unkeepable(type(tensor).__name__)
    if tensor.numel() * tensor.element_size() > MAX_VALUE:
        raise Unkeepable("a large tensor")
    header = [str(tensor.dtype), list(tensor.shape), tensor.device.type, to_bytes(tensor)]
    return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode(header))


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, _Ext):
        return value
    inner = msgspec.msgpack.decode(value.data, ext_hook=_Ext)
    if value.code == _TUPLE:
        return tuple(_unpack(item) for item in inner)
    if value.code == _DICT:
        return {_unpack(key): _unpack(item) for key, item in inner}
    return _unpack_tensor(*inner)


def _unpack_tensor(dtype: str, shape: list[int], device: str, raw: bytes) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=_DTYPES[dtype])
    if raw:
        tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return tensor.to(device)
