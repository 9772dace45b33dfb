"""State of any other object: whatever its state_dict() shows and its load_state_dict() takes (schedulers, EMA, ...)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpointless_elastic.state.holder import Found, Holder, Maker
from checkpointless_elastic.state.pieces import OBJECT
from checkpointless_elastic.state.tree import Node, copy_plain, pack, same, tensors_of, unpack

__all__ = ["ObjectHolder", "TensorHolder"]


class ObjectHolder(Holder):
    """An object with state_dict() and load_state_dict().

    A tensor that state_dict() shows twice at the same address is the object's own: it becomes a piece and is written
    in place. One that is a copy travels with the other values and is given back by load_state_dict().
    """

    def __init__(self, name: str, target: Any) -> None:
        super().__init__(name)
        self._target = target
        self._live: dict[str, torch.Tensor] = {}
        self._shown = 0
        self._noted = (0, 0)

    def tensors(self) -> Iterator[Found]:
        first = dict(tensors_of(self._target.state_dict(), self.name))
        self._shown = len(first)
        if first:
            second = dict(tensors_of(self._target.state_dict(), self.name))
            first = {key: tensor for key, tensor in first.items() if _same_memory(tensor, second.get(key))}
        self._live = first
        for key, tensor in first.items():
            yield Found(key, OBJECT, tensor)

    def containers(self) -> Iterator[dict[Any, Any]]:
        return iter(())

    def plain(self) -> Any:
        return pack(self._target.state_dict(), self.name, self._is_live)

    def _is_live(self, path: str, tensor: torch.Tensor) -> bool:
        return _same_memory(tensor, self._live.get(path))

    def adopt(self, plain: Any, maker: Maker) -> None:
        """Make the same tensors by load_state_dict() of zeros, if they are not there."""
        live = {found.key: found.tensor for found in self.tensors()}
        asked = list(_pieces_in(plain))
        if asked == list(live) and all(maker.tensor(key, live[key], None) is live[key] for key in asked):
            return
        near = next(iter(live.values()), None)
        self._target.load_state_dict(
            unpack(plain, lambda key: maker.tensor(key, live.get(key), near).zero_())
        )

    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        self._target.load_state_dict(unpack(plain, lambda key: live[key]))

    def stale(self) -> bool:
        return self._noted != (len(self._live), self._shown)

    def note(self) -> Any:
        self._noted = (0, 0)
        return copy_plain(self._target.state_dict(), self._keep)

    def _keep(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor in the state_dict() is a live piece; counts, so that `stale` sees others appear."""
        kept = any(_same_memory(tensor, piece) for piece in self._live.values())
        self._noted = (self._noted[0] + kept, self._noted[1] + 1)
        return kept

    def put_back(self, noted: Any) -> None:
        """Blocks for one load_state_dict() if anything differs; the live tensors are back already."""
        if not same(self._target.state_dict(), noted):
            self._target.load_state_dict(noted)


class TensorHolder(Holder):
    """A tensor that the user named himself."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        super().__init__(name)
        self._tensor = tensor

    def tensors(self) -> Iterator[Found]:
        yield Found(self.name, OBJECT, self._tensor)

    def containers(self) -> Iterator[dict[Any, Any]]:
        return iter(())

    def plain(self) -> Any:
        return None

    def adopt(self, plain: Any, maker: Maker) -> None:
        """The script makes it; a difference is found by the inventory's comparison."""

    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        """A tensor has no other state."""


def _same_memory(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    if tensor is other:
        return True
    return (
        other is not None
        and tensor.numel() > 0
        and tensor.data_ptr() == other.data_ptr()
        and tensor.shape == other.shape
        and tensor.dtype == other.dtype
    )


def _pieces_in(node: Node) -> Iterator[str]:
    """Paths of the pieces in a skeleton, in order."""
    kind, content = node
    if kind == "t":
        yield content
    elif kind in ("d", "o"):
        for _, item in content:
            yield from _pieces_in(item)
    elif kind in ("l", "u"):
        for item in content:
            yield from _pieces_in(item)
