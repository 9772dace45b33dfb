"""Who hears of zero_grad, backward and optimizer steps: the only patches of torch in this package.

Read in torch 2.6 to 2.13: `Optimizer.zero_grad` and `Module.zero_grad` are plain methods, `Tensor.backward` looks
`torch.autograd.backward` up at each call, and `register_optimizer_step_post_hook` exists. An optimizer that overrides
zero_grad is not heard, which costs copies of its gradients and nothing else. tests/state/test_watch.py fails when one
of these changes.
"""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Observer", "observe"]

_observers: tuple[weakref.ref[Observer], ...] = ()  # a WeakSet is slow to iterate
_installed = False


class Observer(ABC):
    """Called on the thread that runs the step, before or after the real function."""

    @abstractmethod
    def before_zero_grad(self, params: Sequence[torch.Tensor], set_to_none: bool) -> None:
        """Gradients are about to be dropped or zeroed."""

    @abstractmethod
    def after_zero_grad(self, params: Sequence[torch.Tensor], set_to_none: bool) -> None:
        """They are None, or zero."""

    @abstractmethod
    def before_backward(self) -> None:
        """Gradients are about to be written."""

    @abstractmethod
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Parameters and optimizer state were written."""


def observe(observer: Observer) -> None:
    """Tell `observer` from now on, for as long as it lives; patches torch at the first call in a process."""
    global _installed, _observers
    if not _installed:
        _installed = True
        Optimizer.zero_grad = _zero_grad(Optimizer.zero_grad, _optimizer_params)  # type: ignore[method-assign]
        nn.Module.zero_grad = _zero_grad(nn.Module.zero_grad, _module_params)  # type: ignore[method-assign]
        torch.autograd.backward = _backward(torch.autograd.backward)
        register_optimizer_step_post_hook(_stepped)
    _observers = (*(known for known in _observers if known() is not None), weakref.ref(observer))


def _living() -> list[Observer]:
    return [observer for known in _observers if (observer := known()) is not None]


def _zero_grad(
    original: Callable[..., None], params_of: Callable[[Any], list[torch.Tensor]]
) -> Callable[..., None]:
    @functools.wraps(original)
    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        observers = _living()
        params = params_of(self) if observers else []
        for observer in observers:
            observer.before_zero_grad(params, set_to_none)
        original(self, set_to_none=set_to_none)
        for observer in observers:
            observer.after_zero_grad(params, set_to_none)

    return zero_grad


def _backward(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> None:
        for observer in _living():
            observer.before_backward()
        original(*args, **kwargs)

    return backward


def _stepped(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[Any, Any]) -> None:
    for observer in _living():
        observer.after_optimizer_step(optimizer)


def _optimizer_params(optimizer: Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _module_params(module: nn.Module) -> list[torch.Tensor]:
    return list(module.parameters())
