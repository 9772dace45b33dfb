"""Return values of replayable functions, kept for replacements."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from checkpointless_elastic.worker.values import MAX_VALUE, decode_value, encode_value


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return bool(torch.equal(left, right)) and left.dtype == right.dtype
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -7,
        0.1,
        "text",
        b"bytes",
        (1, [2.5, None], {"a": (3,)}),
        {1: "one", "two": 2},
        torch.tensor(0.25),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([], dtype=torch.float64),
        torch.ones(3, dtype=torch.bfloat16),
        (torch.zeros(2, dtype=torch.bool), {"loss": torch.tensor(1.5, dtype=torch.float64)}),
    ],
)
def test_a_kept_value_comes_back_as_it_was(value: Any) -> None:
    data = encode_value(value)
    assert data is not None
    assert same(value, decode_value(data))


def test_not_a_number_keeps_its_bits() -> None:
    data = encode_value(torch.tensor(math.nan))
    assert data is not None
    assert decode_value(data).isnan()


def test_a_loss_with_a_graph_comes_back_without_it() -> None:
    loss = (torch.ones(2, requires_grad=True) * 2).sum()
    data = encode_value(loss)
    assert data is not None
    assert decode_value(data).item() == 4.0
    assert not decode_value(data).requires_grad


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(MAX_VALUE), 1 << 80, lambda: None])
def test_a_value_that_cannot_be_kept_says_so(value: Any) -> None:
    assert encode_value(value) is None
