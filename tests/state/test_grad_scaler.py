"""The private details of torch.amp.GradScaler that `state.grad_scaler` reads."""

from __future__ import annotations

import torch
from torch import nn, optim
from torch.amp.grad_scaler import GradScaler

from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.snapshot import AttemptSnapshot
from tests.state.worlds import fill


def _step(model: nn.Module, optimizer: optim.Optimizer, scaler: GradScaler, factor: float = 1.0) -> None:
    scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def _world(seed: int) -> tuple[nn.Module, optim.Optimizer, GradScaler]:
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    return model, optim.SGD(model.parameters(), 0.1), GradScaler("cpu", init_scale=8.0, growth_interval=3)


def _inventory(world: tuple[nn.Module, optim.Optimizer, GradScaler]) -> Inventory:
    return Inventory(dict(zip(("model", "optimizer", "scaler"), world, strict=True)))


def test_scale_and_growth_travel_in_this_version_of_torch() -> None:
    source, target = _world(0), _world(1)
    _step(*source)
    _step(*source, factor=float("inf"))
    _step(*source)
    fill(_inventory(target), _inventory(source))
    assert target[2].state_dict() == source[2].state_dict()
    assert target[2].get_scale() == 4.0
    for _ in range(4):
        _step(*source)
        _step(*target)
    assert target[2].state_dict() == source[2].state_dict()
    assert torch.equal(*(world[0].get_parameter("weight") for world in (source, target)))


def test_a_scaler_that_is_switched_off_travels() -> None:
    source, target = _world(0), _world(1)
    pairs = [(world[0], world[1], GradScaler("cpu", enabled=False)) for world in (source, target)]
    fill(_inventory(pairs[1]), _inventory(pairs[0]))


def test_a_void_attempt_leaves_the_scaler_as_it_was() -> None:
    world = model, optimizer, scaler = _world(0)
    snapshot = AttemptSnapshot(_inventory(world))
    for factor in (1.0, float("inf"), 1.0, 1.0):
        before = dict(scaler.state_dict())
        snapshot.begin()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        if factor != 1.0:
            scaler.step(optimizer)
            scaler.update()
        assert not snapshot.gate()
        snapshot.restore()
        assert scaler.state_dict() == before
        _step(model, optimizer, scaler, factor)
