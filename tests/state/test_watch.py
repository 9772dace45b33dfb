"""The details of torch that `state.watch` and `state.gradients` rely on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn, optim

from checkpointless_elastic.state.watch import Observer, observe


class _Diary(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []
        observe(self)

    def before_zero_grad(self, params: Sequence[torch.Tensor], set_to_none: bool) -> None:
        self.lines.append(f"before zero_grad {len(params)} {set_to_none}")

    def after_zero_grad(self, params: Sequence[torch.Tensor], set_to_none: bool) -> None:
        self.lines.append(f"after zero_grad {len(params)} {set_to_none}")

    def before_backward(self) -> None:
        self.lines.append("backward")

    def after_optimizer_step(self, optimizer: optim.Optimizer) -> None:
        self.lines.append(f"step {type(optimizer).__name__}")


def test_zero_grad_backward_and_step_are_heard_in_this_version_of_torch() -> None:
    diary = _Diary()
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters())
    optimizer.zero_grad(set_to_none=False)
    model.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert diary.lines == [
        "before zero_grad 2 False",
        "after zero_grad 2 False",
        "before zero_grad 2 True",
        "after zero_grad 2 True",
        "backward",
        "step SGD",
    ], "torch no longer calls Optimizer.zero_grad, Module.zero_grad or torch.autograd.backward as it was read"


def test_an_observer_that_is_gone_hears_nothing() -> None:
    diary = _Diary()
    lines = diary.lines
    del diary
    nn.Linear(1, 1).zero_grad()
    assert lines == []


def test_a_gradient_that_is_added_to_counts_versions() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    before = model.weight.grad._version
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad._version > before, "AccumulateGrad no longer counts versions"
