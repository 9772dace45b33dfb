"""A replay is called with what the first attempt was called with."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.snapshot import ArgumentGuard


def test_items_taken_out_of_a_batch_are_there_again() -> None:
    batch = {"input": torch.ones(2), "labels": torch.zeros(2)}
    guard = ArgumentGuard()
    guard.begin((batch,), {})
    (given,), _ = guard.arguments()
    given.pop("labels")
    (again,), _ = guard.arguments()
    assert again is batch
    assert list(again) == ["input", "labels"]


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [t], lambda t: {"a": (t, 1)}, lambda t: UserDict(x=t)]
)
def test_tensors_written_in_place_are_given_back_at_every_call(wrap: Any) -> None:
    guard = ArgumentGuard()
    for _ in range(3):
        tensor = torch.ones(3)
        guard.begin((), {"batch": wrap(tensor)})
        for _attempt in range(3):
            guard.arguments()
            assert tensor.tolist() == [1, 1, 1]
            tensor.add_(1)
        guard.end()


def test_a_function_that_writes_nothing_costs_no_copy_after_its_first_call() -> None:
    guard = ArgumentGuard()
    for call in range(3):
        guard.begin((torch.ones(3),), {})
        guard.arguments()
        assert (guard._clones is not None) == (call == 0)
        guard.end()


def test_a_first_write_without_a_clone_is_said_and_then_learned() -> None:
    guard = ArgumentGuard("train_step", first_copy_bytes=0)
    tensor = torch.ones(3)
    guard.begin((tensor,), {})
    guard.arguments()
    tensor.add_(1)
    with pytest.raises(StateMismatchError, match="train_step wrote into its tensor arguments"):
        guard.arguments()
    guard.begin((tensor,), {})
    guard.arguments()
    tensor.add_(1)
    guard.arguments()
    assert tensor.tolist() == [2, 2, 2]


def test_gradients_of_arguments_are_put_back() -> None:
    data = torch.ones(3)
    guard = ArgumentGuard()
    guard.begin((data,), {})
    guard.arguments()
    data.requires_grad_().sum().backward()
    guard.arguments()
    assert not data.requires_grad
    assert data.grad is None


def test_nothing_is_held_after_the_end() -> None:
    guard = ArgumentGuard()
    guard.begin((torch.ones(3),), {})
    guard.arguments()
    guard.end()
    assert guard.arguments() == ((), {})
