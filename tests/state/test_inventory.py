"""A replacement that takes over a survivor's state goes on bit by bit as the survivor does."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedulers

from checkpointless_elastic.errors import ConfigError, StateMismatchError
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.pieces import Manifest
from tests.state.worlds import World, batches, bits, build, fill, plain

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd_momentum": functools.partial(optim.SGD, lr=0.1, momentum=0.9),
    "sgd_plain": functools.partial(optim.SGD, lr=0.1),
    "adam": functools.partial(optim.Adam, lr=0.01, amsgrad=True),
    "adam_tensor_lr": lambda params: optim.Adam(
        params, lr=torch.tensor(0.01), capturable=False, foreach=False
    ),
    "adamw_fused": functools.partial(optim.AdamW, lr=0.01, fused=True),
    "adamw_foreach": functools.partial(optim.AdamW, lr=0.01, foreach=True),
    "adafactor": functools.partial(optim.Adafactor, lr=0.01),
    "rmsprop": functools.partial(optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "nadam": functools.partial(optim.NAdam, lr=0.01),
    "rprop": functools.partial(optim.Rprop, lr=0.01),
}
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "one_cycle": lambda opt: schedulers.OneCycleLR(opt, 0.1, total_steps=40),
    "warm_restarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3),
    "lambda": lambda opt: schedulers.LambdaLR(opt, lambda step: 0.9**step),
    "plateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0),
    "multi_step": lambda opt: schedulers.MultiStepLR(opt, [2, 4]),
    "sequence": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt), schedulers.ExponentialLR(opt, 0.5)], [3]
    ),
}


def _assert_goes_on_equally(source: World, target: World) -> None:
    fill(target.inventory(), source.inventory())
    assert bits(target.inventory()) == bits(source.inventory())
    data = list(batches(7))[3:]
    results = []
    for world in (source, target):
        torch.manual_seed(3)
        for batch in data:
            world.step(batch)
        results.append((bits(world.inventory()), repr(plain(world.inventory()))))
    assert results[0] == results[1]


def _trained(*args: Any, steps: int = 3) -> World:
    world = build(0, *args)
    for batch in batches(steps):
        world.step(batch)
    return world


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_replacement_goes_on_as_the_source(name: str) -> None:
    _assert_goes_on_equally(_trained(OPTIMIZERS[name]), build(1, OPTIMIZERS[name]))


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw_foreach"])
def test_a_replacement_that_has_trained_already_drops_its_own_state(name: str) -> None:
    target = build(1, OPTIMIZERS[name])
    for batch in batches(1):
        target.step(batch)
    _assert_goes_on_equally(_trained(OPTIMIZERS[name]), target)


def test_a_source_before_its_first_step_empties_the_optimizer_of_the_replacement() -> None:
    target = build(1, OPTIMIZERS["adam"])
    for batch in batches(2):
        target.step(batch)
    _assert_goes_on_equally(build(0, OPTIMIZERS["adam"]), target)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_the_source_does(name: str) -> None:
    make = functools.partial(optim.SGD, lr=0.1, momentum=0.9)
    _assert_goes_on_equally(_trained(make, SCHEDULERS[name]), build(1, make, SCHEDULERS[name]))


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_side_by_side() -> None:
    def world(seed: int) -> tuple[nn.Linear, list[optim.Optimizer]]:
        torch.manual_seed(seed)
        model = nn.Linear(6, 6)
        return model, [optim.Muon([model.weight], lr=0.01), optim.AdamW([model.bias])]

    def step(model: nn.Linear, optimizers: list[optim.Optimizer]) -> None:
        model(torch.ones(2, 6)).square().sum().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()

    source, target = world(0), world(1)
    step(*source)
    inventories = [Inventory({"model": model, "optimizer": opts}) for model, opts in (source, target)]
    fill(inventories[1], inventories[0])
    step(*source)
    step(*target)
    assert bits(inventories[0]) == bits(inventories[1])


def test_lbfgs_history_travels() -> None:
    def world(seed: int) -> tuple[nn.Linear, optim.LBFGS]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 1)
        return model, optim.LBFGS(model.parameters(), max_iter=3)

    def step(model: nn.Linear, optimizer: optim.LBFGS) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(torch.eye(4)) - torch.arange(4.0).view(4, 1)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    source, target = world(0), world(1)
    for _ in range(3):
        step(*source)
    inventories = [Inventory({"model": model, "optimizer": opt}) for model, opt in (source, target)]
    fill(inventories[1], inventories[0])
    step(*source)
    step(*target)
    assert bits(inventories[0]) == bits(inventories[1])


def test_the_average_of_a_model_travels() -> None:
    source, target = build(0, OPTIMIZERS["adam"]), build(1, OPTIMIZERS["adam"])
    for world in (source, target):
        del world.model.mask  # expanded: AveragedModel cannot write it
        world.extra["ema"] = optim.swa_utils.AveragedModel(
            world.model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
    for batch in batches(3):
        source.step(batch)
    _assert_goes_on_equally(source, target)


class _Shadow:
    """An EMA that is not a module and makes its tensors late."""

    def __init__(self) -> None:
        self.shadow: list[torch.Tensor] = []
        self.updates = 0

    def update_parameters(self, model: nn.Module) -> None:
        params = [param.detach() for param in model.parameters()]
        if not self.shadow:
            self.shadow = [param.clone() for param in params]
        for mine, param in zip(self.shadow, params, strict=True):
            mine.lerp_(param, 0.1)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates, "copy": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = list(state["shadow"])
        self.updates = state["updates"]


def test_an_object_that_makes_its_tensors_late_travels() -> None:
    source, target = build(0, OPTIMIZERS["adam"]), build(1, OPTIMIZERS["adam"])
    source.extra["ema"], target.extra["ema"] = _Shadow(), _Shadow()
    for batch in batches(2):
        source.step(batch)
    keys = [piece.key for piece in source.inventory().pieces()]
    assert "ema.shadow.0" in keys
    assert "ema.copy" not in keys
    _assert_goes_on_equally(source, target)


def test_gradients_that_stand_travel_and_others_are_removed() -> None:
    source, target = build(0, OPTIMIZERS["sgd_momentum"]), build(1, OPTIMIZERS["sgd_momentum"])
    batch = next(iter(batches(1)))
    source.model(batch).sum().backward()
    target.model(batch).sum().backward()
    source.model.conv.weight.grad = None  # type: ignore[union-attr]
    fill(target.inventory(), source.inventory())
    assert bits(target.inventory()) == bits(source.inventory())
    assert any(piece.info.role == "gradient" for piece in source.inventory().pieces())
    assert target.model.conv.weight.grad is None  # type: ignore[union-attr]


def test_layers_frozen_and_modes_set_on_the_way_travel() -> None:
    source, target = build(0, OPTIMIZERS["adam"]), build(1, OPTIMIZERS["adam"])
    source.model.up.requires_grad_(False)  # type: ignore[union-attr]
    source.model.norm.eval()  # type: ignore[union-attr]
    fill(target.inventory(), source.inventory())
    assert not target.model.up.weight.requires_grad  # type: ignore[union-attr]
    assert not target.model.norm.training  # type: ignore[union-attr]
    assert target.model.training


def test_a_group_added_on_the_way_travels() -> None:
    source, target = build(0, OPTIMIZERS["adam"]), build(1, OPTIMIZERS["adam"])
    frozen = source.model.frozen
    assert isinstance(frozen, nn.Linear)
    source.optimizer.add_param_group({"params": list(frozen.requires_grad_().parameters()), "lr": 0.5})
    for batch in batches(2):
        source.step(batch)
    _assert_goes_on_equally(source, target)
    assert len(target.optimizer.param_groups) == 2


def test_tensors_are_filled_in_place_so_that_others_keep_seeing_them() -> None:
    source, target = _trained(OPTIMIZERS["adam"]), build(1, OPTIMIZERS["adam"])
    weight = target.model.get_parameter("up.weight")
    groups = target.optimizer.param_groups
    group = groups[0]
    fill(target.inventory(), source.inventory())
    assert target.model.get_parameter("up.weight") is weight
    assert target.optimizer.param_groups is groups
    assert groups[0] is group
    assert any(param is weight for param in group["params"])


def test_tied_weights_and_views_of_them_are_one_piece() -> None:
    model = nn.Module()
    model.a = nn.Linear(3, 3, bias=False)
    model.b = nn.Linear(3, 3, bias=False)
    model.b.weight = nn.Parameter(model.a.weight.detach())
    assert [piece.key for piece in Inventory({"model": model}).pieces()] == ["model.a.weight"]


def test_the_manifest_survives_msgpack() -> None:
    manifest = _trained(OPTIMIZERS["adam"], SCHEDULERS["one_cycle"]).inventory().manifest()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest) == manifest


def test_taking_state_over_draws_no_random_numbers() -> None:
    source, target = _trained(OPTIMIZERS["adam"]), build(1, OPTIMIZERS["adam"])
    before = torch.get_rng_state()
    fill(target.inventory(), source.inventory())
    assert torch.equal(before, torch.get_rng_state())


def test_another_model_is_refused_with_the_name_of_the_first_piece_that_differs() -> None:
    source, target = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(StateMismatchError, match=r"model\.0\.weight .*\[4, 3\].* here, .*\[3, 3\].* there"):
        Inventory({"model": target}).adopt(Inventory({"model": source}).manifest())


def test_other_names_in_run_are_refused() -> None:
    with pytest.raises(StateMismatchError, match="'net'.*'model'"):
        Inventory({"net": nn.Linear(1, 1)}).adopt(Inventory({"model": nn.Linear(1, 1)}).manifest())


class _Odd:
    def state_dict(self) -> dict[str, Any]:
        return {"function": lambda: 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


def test_state_that_cannot_be_read_safely_is_refused_at_once_with_its_name() -> None:
    with pytest.raises(StateMismatchError, match="'odd'.*weights_only"):
        Inventory({"odd": _Odd()})


def test_an_object_without_state_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"Run\(x\.1=\.\.\.\) got a int"):
        Inventory({"x": [nn.Linear(1, 1), 3]})


def test_dicts_of_optimizers_are_named_by_their_keys() -> None:
    model = nn.Linear(2, 2)
    opts = OrderedDict(d=optim.Adam(model.parameters()))
    inventory = Inventory({"model": model, "optimizer": dict(opts)})
    model(torch.ones(1, 2)).sum().backward()
    opts["d"].step()
    assert "optimizer.d.state.model.weight.exp_avg" in [piece.key for piece in inventory.pieces()]


def test_sparse_tensors_are_refused_with_their_name() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(StateMismatchError, match=r"model\.table .*torch\.sparse_coo"):
        Inventory({"model": module})
