"""A void attempt is undone bit by bit: as if the step had never begun."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.snapshot import AttemptSnapshot
from tests.state.worlds import World, batches, bits, build, plain

_ADAM = functools.partial(optim.Adam, lr=0.01)
_ONE_CYCLE = functools.partial(optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=40)


def _everything(inventory: Inventory) -> tuple[dict[str, bytes], str]:
    return bits(inventory), repr(plain(inventory))


def _forward_backward(world: World, batch: torch.Tensor) -> None:
    world.model(batch).square().mean().backward()


def test_every_attempt_of_a_training_run_can_be_undone_and_repeated() -> None:
    world, twin = build(0, _ADAM, _ONE_CYCLE), build(0, _ADAM, _ONE_CYCLE)
    inventory = world.inventory()
    snapshot = AttemptSnapshot(inventory)
    for batch in batches(6):
        before = _everything(inventory)
        start = torch.get_rng_state()
        for _void in range(2):
            snapshot.begin()
            _forward_backward(world, torch.randn_like(batch))
            assert not snapshot.gate(), snapshot.unprepared
            snapshot.restore()
            assert _everything(inventory) == before
        snapshot.begin()
        for each in (world, twin):
            torch.set_rng_state(start)
            each.step(batch)
    assert _everything(inventory) == _everything(twin.inventory())


def test_running_statistics_are_private_to_the_rank_and_live() -> None:
    world = build(0, _ADAM)
    snapshot = AttemptSnapshot(world.inventory())
    for batch in batches(3):
        snapshot.begin()
        _forward_backward(world, batch)
        snapshot.gate()
        world.optimizer.step()
        world.optimizer.zero_grad()
    pieces = {piece.key: piece.tensor for piece in snapshot.written_before_gate()}
    norm = world.model.norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert set(pieces) == {
        "model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked",
        "model.hidden", "model.scalar", "model.middle",
    }  # fmt: skip
    assert pieces["model.norm.running_mean"] is norm.running_mean


def test_batch_norm_is_known_although_it_counts_no_versions() -> None:
    """The reason for comparing bits: native batch_norm writes running_mean without a new version."""
    model = nn.BatchNorm1d(3)
    assert model.running_mean is not None
    before = model.running_mean._version
    model(torch.randn(4, 3))
    if model.running_mean._version != before:
        pytest.skip("this torch counts versions in batch_norm; comparing bits is no longer needed for it")
    snapshot = AttemptSnapshot(Inventory({"model": model}))
    for _ in range(4):
        mean = model.running_mean.clone()
        snapshot.begin()
        model(torch.randn(4, 3))
        assert not snapshot.gate()
        snapshot.restore()
        assert torch.equal(mean, model.running_mean)
        model(torch.randn(4, 3))


def _gan(optimizer: Callable[[Any], optim.Optimizer]) -> tuple[list[nn.Module], list[optim.Optimizer]]:
    torch.manual_seed(0)
    models: list[nn.Module] = [nn.Linear(3, 3), nn.Linear(3, 1)]
    return models, [optimizer(model.parameters()) for model in models]


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_that_steps_before_the_gate_is_undone(
    kernel: dict[str, bool], set_to_none: bool
) -> None:
    models, optimizers = _gan(functools.partial(optim.AdamW, lr=0.1, **kernel))
    inventory = Inventory({"model": models, "optimizer": optimizers})
    snapshot = AttemptSnapshot(inventory)

    def to_the_gate(data: torch.Tensor) -> None:
        optimizers[1].zero_grad(set_to_none)
        models[1](models[0](data).detach()).sum().backward()
        optimizers[1].step()
        optimizers[0].zero_grad(set_to_none)
        models[1](models[0](data)).square().sum().backward()

    for step in range(5):
        before = _everything(inventory)
        snapshot.begin()
        to_the_gate(torch.full((2, 3), float(step)))
        assert not snapshot.gate(), snapshot.unprepared
        snapshot.restore()
        after = _everything(inventory)
        dropped = {key for key in before[0] if key.endswith(":grad")}
        assert {k: v for k, v in after[0].items() if k not in dropped} == {
            k: v for k, v in before[0].items() if k not in dropped
        }
        snapshot.begin()
        to_the_gate(torch.full((2, 3), float(step)))
        snapshot.gate()
        optimizers[0].step()


def _accumulate(set_to_none: bool, void_at: int | None) -> dict[str, bytes]:
    """Three calls add up gradients, each fourth steps; one attempt is void."""
    world = build(0, _ADAM)
    inventory = world.inventory()
    snapshot = AttemptSnapshot(inventory)
    torch.manual_seed(5)
    for number, batch in enumerate(batches(9)):
        start = torch.get_rng_state()
        for attempt in range(1 + (number == void_at)):
            torch.set_rng_state(start)
            snapshot.begin()
            _forward_backward(world, batch)
            assert not snapshot.gate(), snapshot.unprepared
            if number == void_at and attempt == 0:
                snapshot.restore()
        if number % 4 == 3:
            world.optimizer.step()
            world.optimizer.zero_grad(set_to_none)
    return bits(inventory)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_are_put_back(set_to_none: bool) -> None:
    expected = _accumulate(set_to_none, None)
    for void_at in range(9):
        assert _accumulate(set_to_none, void_at) == expected, void_at


def test_gradients_that_calls_add_to_are_private_to_the_rank() -> None:
    model = nn.Linear(2, 2)
    snapshot = AttemptSnapshot(Inventory({"model": model}))
    for _ in range(3):
        snapshot.begin()
        model(torch.ones(1, 2)).sum().backward()
        snapshot.gate()
    snapshot.begin()
    assert [piece.key for piece in snapshot.written_before_gate()] == ["model.weight:grad", "model.bias:grad"]
    model.zero_grad(set_to_none=False)
    snapshot.begin()
    assert snapshot.written_before_gate() == []


def test_zero_grad_at_the_start_of_the_step_costs_no_copy_and_holds_no_gradient() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters())
    snapshot = AttemptSnapshot(Inventory({"model": model, "optimizer": optimizer}))
    for _ in range(3):
        snapshot.begin()
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        assert not snapshot.gate()
        optimizer.step()
    assert not snapshot._gradients.accumulated
    snapshot.begin()
    optimizer.zero_grad()
    assert all(start.tensor is None for start in snapshot._gradients._starts.values())


def test_state_that_the_attempt_creates_is_removed() -> None:
    world = build(0, _ADAM)
    inventory = world.inventory()
    snapshot = AttemptSnapshot(inventory)
    before = _everything(inventory)
    snapshot.begin()
    _forward_backward(world, next(iter(batches(1))))
    world.model.register_buffer("late", torch.ones(3))
    world.optimizer.step()
    assert not snapshot.gate()
    snapshot.restore()
    assert _everything(inventory) == before
    assert not world.optimizer.state


class _Assigns(nn.Module):
    """A module that puts a new tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean * 0.9 + data.mean(0) * 0.1
        return data * self.weight - self.mean


def test_a_buffer_that_is_assigned_anew_comes_back_and_is_private() -> None:
    model = _Assigns()
    inventory = Inventory({"model": model})
    snapshot = AttemptSnapshot(inventory)
    for _ in range(4):
        before = bits(inventory)
        snapshot.begin()
        model(torch.randn(2, 3))
        assert not snapshot.gate()
        snapshot.restore()
        assert bits(inventory) == before
        snapshot.begin()
        model(torch.randn(2, 3))
        assert not snapshot.gate()
    snapshot.begin()
    (piece,) = snapshot.written_before_gate()
    assert piece.tensor is model.mean


def test_hyperparameters_modes_and_extra_objects_come_back() -> None:
    world = build(0, functools.partial(optim.Adam, lr=0.01), _ONE_CYCLE)
    inventory = world.inventory()
    snapshot = AttemptSnapshot(inventory)
    for batch in batches(3):
        before = _everything(inventory)
        snapshot.begin()
        _forward_backward(world, batch)
        world.optimizer.param_groups[0]["lr"] = 5.0
        world.optimizer.param_groups[0]["new"] = 1
        world.scheduler.step()
        world.model.eval()
        world.model.get_parameter("conv.weight").requires_grad_(False)
        assert not snapshot.gate()
        snapshot.restore()
        assert _everything(inventory) == before
        world.step(batch)


def test_what_is_written_late_for_the_first_time_is_reported_then_learned() -> None:
    model = nn.Module()
    model.register_buffer("count", torch.zeros(3))
    snapshot = AttemptSnapshot(Inventory({"model": model}))
    for _ in range(3):
        snapshot.begin()
        assert not snapshot.gate()
    snapshot.begin()
    model.get_buffer("count").add_(1)
    assert snapshot.unprepared == ["model.count"]
    with pytest.raises(StateMismatchError, match=r"changed model\.count .* for the first time"):
        snapshot.restore()
    snapshot.begin()
    model.get_buffer("count").add_(1)
    assert not snapshot.gate()
    snapshot.restore()
    assert model.get_buffer("count").tolist() == [1.0] * 3


def test_a_replacement_is_told_what_to_copy() -> None:
    model = nn.Module()
    model.register_buffer("count", torch.zeros(3))
    snapshot = AttemptSnapshot(Inventory({"model": model}), first_copy_bytes=0)
    snapshot.learn(["model.count"], [])
    assert [piece.key for piece in snapshot.written_before_gate()] == ["model.count"]
    snapshot.begin()
    model.get_buffer("count").add_(1)
    assert not snapshot.gate()


def test_each_function_learns_on_its_own() -> None:
    model = nn.Module()
    model.register_buffer("count", torch.zeros(3))
    snapshot = AttemptSnapshot(Inventory({"model": model}))
    for _ in range(5):
        snapshot.begin("train")
        snapshot.gate()
    snapshot.begin("evaluate")
    model.get_buffer("count").add_(1)
    assert not snapshot.gate()


def test_buckets_of_ddp_that_gradients_are_views_of_come_back(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    try:
        model = DistributedDataParallel(nn.Linear(3, 3), gradient_as_bucket_view=True)
        optimizer = optim.SGD(model.parameters(), 0.1)
        inventory = Inventory({"model": model, "optimizer": optimizer})
        snapshot = AttemptSnapshot(inventory)
        for step in range(4):
            before = bits(inventory)
            snapshot.begin()
            model(torch.full((1, 3), float(step))).sum().backward()
            assert not snapshot.gate(), snapshot.unprepared
            snapshot.restore()
            assert bits(inventory) == before
            model(torch.full((1, 3), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    finally:
        torch.distributed.destroy_process_group()
    del (
        model,
        optimizer,
        inventory,
        snapshot,
    )  # the reducer before its group: it would wait for a thread of it for ever
    assert group is not None


def test_void_attempts_are_no_calls_that_are_learned_from() -> None:
    """The first call shows where the gate is: the second may write before it what the first did not."""
    model = nn.Linear(3, 3)
    snapshot = AttemptSnapshot(Inventory({"model": model}))
    for _ in range(3):
        snapshot.begin()
        snapshot.restore()
    assert not snapshot.gate()
    before = model.weight.detach().clone()
    snapshot.begin()
    model.weight.data.add_(1)
    assert not snapshot.gate()
    snapshot.restore()
    assert torch.equal(model.weight, before)
