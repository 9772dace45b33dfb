"""What a rank says of its state: where it is due, of the state at the start, nothing if it was written meanwhile."""

from __future__ import annotations

import threading

import torch
from torch import nn

from checkpointless_elastic.protocol.checks import compare
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.worker.verifier import Verifier


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def says(net: nn.Module, step: int = 4, every: int = 2) -> bytes:
    verifier = Verifier(0, every)
    verifier.begin(step, Inventory({"model": net}).pieces)
    return verifier.said()


def test_nothing_is_said_at_steps_that_are_not_due() -> None:
    net = model()
    assert [bool(says(net, step)) for step in range(5)] == [False, False, True, False, True]
    assert not says(net, every=0)


def test_one_bit_makes_a_difference_and_its_tensor_is_named() -> None:
    good, bad = model(), model()
    assert says(good) == says(bad)
    bad[1].running_mean.view(torch.int32)[1] ^= 1  # type: ignore[union-attr,operator]
    (found,) = compare({0: says(good), 1: says(bad), 2: says(good)})
    assert (found.piece, found.wrong) == ("model.1.running_mean", (1,))


def test_what_forward_writes_is_read_before_the_step_begins_and_a_parameter_that_is_written_says_nothing() -> (
    None
):
    net = model()
    verifier, go_on = Verifier(0, 1), threading.Event()
    assert verifier._pool is not None
    before = says(net)
    for write, expected in ((net[1].running_mean, before), (net[0].weight, b"")):
        go_on.clear()
        verifier._pool.submit(go_on.wait)
        verifier.begin(4, Inventory({"model": net}).pieces)
        with torch.no_grad():
            write.add_(1)  # type: ignore[union-attr,operator]
        go_on.set()
        assert verifier.said() == expected
