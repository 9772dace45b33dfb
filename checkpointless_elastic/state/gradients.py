"""Gradients that stand when an attempt begins, and how they come back when it is void.

Copies are made only where they must be, and as late as possible: when backward is about to add to a gradient that is
neither None nor known to be zero (accumulation over several calls). A gradient that the attempt drops or zeroes before
anything used it (`optimizer.zero_grad()` at the start of the step function) is not kept: the replay drops it again, and
zeros stand in its place till then. They must: other ranks, which have not begun the attempt, have it still, and all are
to have the same pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_not

import torch
from torch.optim import Optimizer

from checkpointless_elastic.state.sharding import local
from checkpointless_elastic.state.watch import Observer, observe

__all__ = ["GradientNote"]

_grad = attrgetter("grad")


@dataclass
class _Start:
    """One gradient at the start of the attempt.

    Attributes:
        index: number of its parameter.
        tensor: the gradient, None once it was dropped by the attempt.
        version: its version then.
        copy: its content then, where it had to be copied.
        zero: it was known to be zero, or the attempt zeroed it before anything used it.
    """

    index: int
    tensor: torch.Tensor | None
    version: int
    copy: torch.Tensor | None = None
    zero: bool = False


class GradientNote(Observer):
    """Notes the gradients of `params`; used by `AttemptSnapshot` from the main thread only."""

    def __init__(self) -> None:
        self._params: list[torch.Tensor] = []
        self._index: dict[int, int] = {}
        self._zeroed: dict[int, tuple[int, int]] = {}
        self._starts: dict[int, _Start] = {}
        self._open = False
        self._used = False
        self._backward_seen = False
        self.accumulated: set[int] = set()
        self.stepped: list[Optimizer] = []
        observe(self)

    def follow(self, params: Sequence[torch.Tensor]) -> None:
        """Note these parameters from the next `begin` on."""
        if list(map(id, params)) == list(map(id, self._params)):
            return
        self._params = list(params)
        self._index = {id(param): index for index, param in enumerate(self._params)}
        self._zeroed = {}
        self.accumulated = set()

    def begin(self) -> None:
        """Start of an attempt."""
        self._open = True
        self._used = False
        self._backward_seen = False
        self.stepped = []
        self._starts = {}
        grads = list(map(_grad, self._params))
        if not any(map(is_not, grads, repeat(None))):
            return
        for index, grad in enumerate(grads):
            if grad is not None:
                zero = self._zeroed.get(index) == (id(grad), _version(grad))
                self._starts[index] = _Start(index, grad, _version(grad), zero=zero)

    def gate(self) -> list[int]:
        """End of what can be undone; the parameters whose gradients were changed by something not watched."""
        self._open = False
        if not self._starts:
            return []
        return [start.index for start in self._starts.values() if _lost(start)]

    def restore(self) -> None:
        """Put all gradients back; those that the attempt dropped first are zero."""
        self._open = False
        with torch.no_grad():
            for index, param in enumerate(self._params):
                start = self._starts.get(index)
                grad = _restored(start, param) if start else None
                if param.grad is not grad:
                    param.grad = grad

    def private(self) -> list[int]:
        """Parameters whose gradients stand now, are not known to be zero, and are added to by later calls."""
        return [index for index in sorted(self.accumulated) if self._stands(index)]

    def ended(self) -> None:
        """A call without an optimizer step has returned: what it wrote is for later calls to add to."""
        for index, param in enumerate(self._params):
            start, grad = self._starts.get(index), param.grad
            known = start is not None and start.tensor is grad
            untouched = known and grad is not None and start.version == _version(grad)  # type: ignore[union-attr]
            if not untouched and self._stands(index):
                self.accumulated.add(index)

    def _stands(self, index: int) -> bool:
        grad = self._params[index].grad
        return grad is not None and self._zeroed.get(index) != (id(grad), _version(grad))

    def before_backward(self) -> None:
        """Copy what stands and is about to be added to."""
        if not self._open or self._backward_seen:
            return
        self._backward_seen = True
        for start in self._starts.values():
            if self._params[start.index].grad is not start.tensor:
                start.tensor = None if start.copy is None and not self._used else start.tensor
            elif not start.zero and start.copy is None and start.tensor is not None and not _lost(start):
                start.copy = start.tensor.detach().clone()
                self.accumulated.add(start.index)

    def before_zero_grad(self, params: Sequence[torch.Tensor], set_to_none: bool) -> None:
        """Let go of gradients that nothing used; copy those that an optimizer used in this attempt."""
        if not self._open:
            return
        for param in params:
            start = self._starts.get(self._index.get(id(param), -1))
            if start is None or start.tensor is None or param.grad is not start.tensor or _lost(start):
                continue
            if start.zero or start.copy is not None:
                start.tensor = None if set_to_none else start.tensor
            elif not self._used and set_to_none:
                start.tensor = None
            elif not self._used:
                start.zero = True
            elif not set_to_none:
                start.copy = start.tensor.detach().clone()

    def after_zero_grad(self, params: Sequence[torch.Tensor], set_to_none: bool) -> None:
        """Remember which gradients are zero now."""
        if set_to_none:
            return
        for param in params:
            index = self._index.get(id(param))
            if index is not None and param.grad is not None:
                self._zeroed[index] = (id(param.grad), _version(param.grad))

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """From now on the gradients of this attempt were used."""
        if self._open:
            self._used = True
            self.stepped.append(optimizer)


def _version(grad: torch.Tensor) -> int:
    """Goes up with each write, also of the local part of a DTensor, which FSDP2 adds to."""
    return grad._version if type(grad) is torch.Tensor else grad._version + local(grad)._version


def _lost(start: _Start) -> bool:
    """Whether the gradient changed without a copy."""
    if start.tensor is None or start.zero or start.copy is not None:
        return False
    return _version(start.tensor) != start.version


def _restored(start: _Start, param: torch.Tensor) -> torch.Tensor:
    """The gradient as it was, in its old tensor where that is still held."""
    if start.copy is not None:
        return start.copy if start.tensor is None else start.tensor.copy_(start.copy)
    if start.tensor is None:
        return torch.zeros_like(param)
    return start.tensor.zero_() if start.zero else start.tensor
