"""Nested state (dicts, lists, tuples) taken apart into tensors and a skeleton that torch.load(weights_only=True) reads.

A skeleton is made of tagged pairs, so that nothing in it has to be guessed when it is put together again:
("t", path) a tensor that travels as a piece, ("d", [(key, node), ...]) a dict, ("o", ...) an OrderedDict,
("l", [node, ...]) a list, ("u", [...]) a tuple, ("v", value) anything else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch

__all__ = ["Node", "copy_plain", "pack", "same", "tensors_of", "unpack"]

Node = tuple[str, Any]

_ATOMS = (int, float, bool, str, bytes, complex, type(None))


def pack(value: Any, path: str, is_piece: Callable[[str, torch.Tensor], bool]) -> Node:
    """The skeleton of a value; a tensor for which `is_piece(path, tensor)` is false travels in the skeleton."""
    if isinstance(value, torch.Tensor):
        return ("t", path) if is_piece(path, value) else ("v", value.detach())
    if type(value) in (dict, OrderedDict):
        items = [(key, pack(item, f"{path}.{key}", is_piece)) for key, item in value.items()]
        return ("d" if type(value) is dict else "o", items)
    if type(value) in (list, tuple):
        nodes = [pack(item, f"{path}.{index}", is_piece) for index, item in enumerate(value)]
        return ("l" if type(value) is list else "u", nodes)
    return ("v", value)


def unpack(node: Node, tensor_for: Callable[[str], torch.Tensor]) -> Any:
    """The value of a skeleton, with `tensor_for(path)` in the place of each piece."""
    kind, content = node
    if kind == "t":
        return tensor_for(content)
    if kind == "v":
        return content
    if kind in ("d", "o"):
        items = {key: unpack(item, tensor_for) for key, item in content}
        return items if kind == "d" else OrderedDict(items)
    values = [unpack(item, tensor_for) for item in content]
    return values if kind == "l" else tuple(values)


def tensors_of(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and tensor of each tensor in nested dicts, lists and tuples; the paths are those of `pack`."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif type(value) in (dict, OrderedDict):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}.{index}")


def copy_plain(value: Any, keep: Callable[[torch.Tensor], bool]) -> Any:
    """A copy that later changes of the original do not reach; tensors for which `keep` is true are not cloned."""
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, torch.Tensor):
        return value if keep(value) else value.detach().clone()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copy_plain(item, keep)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copy_plain(item, keep) for item in value)
    return deepcopy(value)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, tensors bit by bit; values that cannot be compared count as different."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and bool(torch.equal(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, _ATOMS) and bool(left == right)
