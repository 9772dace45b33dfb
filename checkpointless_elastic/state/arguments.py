"""Arguments of a replayable function: a replay must get what the first attempt got."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_not
from typing import Any

import torch
from torch import nn

from checkpointless_elastic.errors import StateMismatchError

__all__ = ["ArgumentGuard"]

_DEPTH = 4
_PLAIN = (int, float, str, bytes, bool, type(None))
_WHOLE = (*_PLAIN, nn.Module, torch.optim.Optimizer)  # not looked into


class ArgumentGuard:
    """Undoes what attempts do to the arguments of one replayable function. Main thread only.

    Containers (dict, list, objects with attributes, such as a batch from a tokenizer) get their items back: `batch.pop`
    is safe. Tensors that the function writes in place are cloned, once that is learned; at the first call all are
    cloned, up to `first_copy_bytes`. Writes are found by version counters, so a write through `.data` or NumPy is not
    noticed. Iterators that the function consumes cannot be wound back.

    The order of calls: `begin` once per call of the function, `arguments` before each attempt, `end` once it is
    committed or given up.
    """

    def __init__(self, name: str = "The replayable function", first_copy_bytes: int = 64 << 20) -> None:
        self._name = name
        self._limit = first_copy_bytes
        self._writes = False
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._attempts = 0
        self._calls = 0
        self._tensors: list[torch.Tensor] = []
        self._notes: list[tuple[int, bool, torch.Tensor | None]] = []
        self._clones: list[torch.Tensor] | None = None
        self._containers: list[tuple[Any, Any]] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the arguments; clones tensors if the function is known to write into them, or not known yet."""
        self._let_go()
        self._given, self._attempts = (args, kwargs), 0
        for value in _walk([*args, *kwargs.values()]):
            if isinstance(value, torch.Tensor):
                self._tensors.append(value)
            else:
                self._containers.append((value, _content(value)))
        if self._tensors:
            self._notes = [(tensor._version, tensor.requires_grad, tensor.grad if tensor.is_leaf else None)
                           for tensor in self._tensors]  # fmt: skip
            if self._writes or (not self._calls and self._size() <= self._limit):
                self._clones = [tensor.detach().clone() for tensor in self._tensors]
        self._calls += 1

    def _size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    def gate(self) -> bool:
        """Learn whether the function writes into its arguments. True if it did and there are no clones."""
        if not self._tensors:
            return False
        if any(tensor._version != note[0] for tensor, note in zip(self._tensors, self._notes, strict=True)):
            self._writes = True
            return self._clones is None
        return False

    def restore(self) -> None:
        """Give the arguments their content back, in place. StateMismatchError if there are no clones of it."""
        if self.gate():
            raise StateMismatchError(
                f"{self._name} wrote into its tensor arguments for the first time in a void attempt: "
                "it cannot be undone here. Clone the arguments inside the function."
            )
        for container, content in self._containers:
            _put_back(container, content)
        notes = []
        with torch.no_grad():
            for index, (tensor, (version, requires_grad, grad)) in enumerate(
                zip(self._tensors, self._notes, strict=True)
            ):
                if tensor.is_leaf and tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor._version != version and self._clones is not None:
                    tensor.copy_(self._clones[index])
                if tensor.is_leaf:
                    tensor.grad = grad
                notes.append((tensor._version, requires_grad, grad))
        self._notes = notes

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the next attempt is to be called with; from the second attempt on as `restore` leaves it."""
        if self._attempts:
            self.restore()
        self._attempts += 1
        return self._given

    def end(self) -> None:
        """Learn, and let go of the arguments, so that their memory is not held."""
        self.gate()
        self._let_go()

    def _let_go(self) -> None:
        self._given = ((), {})
        self._tensors, self._notes, self._clones, self._containers = [], [], None, []


def _walk(values: list[Any]) -> Iterator[Any]:
    """Each tensor and each mutable container in nested arguments, once."""
    seen: set[int] = set()
    stack = [(value, 0) for value in values if type(value) not in _PLAIN]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, _WHOLE):
            continue
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
            continue
        content = _content(value)
        if content is None:
            continue
        if not isinstance(value, tuple):
            yield value
        items = content.values() if isinstance(content, dict) else content
        stack.extend((item, depth + 1) for item in items)


def _content(value: Any) -> Any:
    """A shallow copy of what a container holds; None for values that are not looked into."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not callable(value) and not isinstance(value, type):
        return dict(attributes)
    return None


def _put_back(container: Any, content: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(content) or any(map(is_not, container, content)):
            container[:] = content
        return
    target = container if isinstance(container, dict) else container.__dict__
    if list(target) != list(content) or any(map(is_not, target.values(), content.values())):
        target.clear()
        target.update(content)
