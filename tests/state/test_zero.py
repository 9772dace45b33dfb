"""ZeroRedundancyOptimizer: each rank's state is found, who has the same is known, and a replacement makes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.sharding import same_place
from checkpointless_elastic.state.snapshot import AttemptSnapshot
from checkpointless_elastic.worker.unnamed import check_optimizers
from tests.state.worlds import bits, fill

WORLD = 4


@pytest.fixture
def rank() -> int:
    return 1


@pytest.fixture(autouse=True)
def group(rank: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of four whose collectives do nothing, as torch has it for such purposes: this process is one of them."""
    monkeypatch.setenv("WORLD_SIZE", str(WORLD))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    yield
    dist.destroy_process_group()
    same_place.cache_clear()


def make(seed: int, **options: Any) -> tuple[nn.Module, ZeroRedundancyOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for width in (3, 4, 5, 6)))
    options = {"optimizer_class": optim.Adam, "lr": 0.1, **options}
    return model, ZeroRedundancyOptimizer(model.parameters(), **options)


def inventory(model: nn.Module, optimizer: ZeroRedundancyOptimizer) -> Inventory:
    return Inventory({"model": model, "optimizer": optimizer})


def step(model: nn.Module, optimizer: ZeroRedundancyOptimizer) -> None:
    for number, param in enumerate(model.parameters()):
        if param.requires_grad:
            param.grad = torch.full_like(param, number + 1.0)
    optimizer.step()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_replacement_makes_the_state_of_its_part_and_goes_on_as_the_source(view: bool, lr: Any) -> None:
    kept = make(0, lr=lr, foreach=False, parameters_as_bucket_view=view)
    made = make(1, lr=lr + 1, foreach=False, parameters_as_bucket_view=view)
    step(*kept)
    kept[1].param_groups[0]["weight_decay"] = 0.5  # what the script sets between steps
    source, target = inventory(*kept), inventory(*made)
    held = {piece.key for piece in source.pieces() if ".state." in piece.key}
    assert {key.split(".state.")[1].rsplit(".", 1)[0] for key in held} == {"model.2.weight"}
    fill(target, source)
    assert bits(target) == bits(source)
    for world in (kept, made):
        step(*world)
    assert bits(target) == bits(source)


def test_state_that_load_state_dict_leaves_outside_of_the_inner_optimizer_is_no_part_of_it() -> None:
    model, optimizer = make(0)
    step(model, optimizer)
    before = [piece.key for piece in inventory(model, optimizer).pieces()]
    params = list(model.parameters())
    state = {n: {"step": torch.tensor(1.0), "exp_avg": p.clone()} for n, p in enumerate(params)}
    groups = optim.Optimizer.state_dict(optimizer)["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    assert optimizer.state
    assert {piece.key for piece in inventory(model, optimizer).pieces()} < set(before)


def test_groups_that_were_added_later_are_parted_as_on_the_survivors() -> None:
    kept, made = make(0, parameters_as_bucket_view=True), make(1, parameters_as_bucket_view=True)
    kept_head, head = (nn.Sequential(*(nn.Linear(7, 7) for _ in range(WORLD))) for _ in range(2))
    kept[1].add_param_group({"params": list(kept_head.parameters()), "lr": 0.2})
    step(nn.Sequential(kept[0], kept_head), kept[1])
    source = Inventory({"model": kept[0], "head": kept_head, "optimizer": kept[1]})
    target = Inventory({"model": made[0], "head": head, "optimizer": made[1]})
    fill(target, source)
    assert bits(target) == bits(source)
    assert any(piece.key.startswith("optimizer.state.head.") for piece in target.pieces())
    for world in ((nn.Sequential(kept[0], kept_head), kept[1]), (nn.Sequential(made[0], head), made[1])):
        step(*world)
    assert bits(target) == bits(source)


def test_the_state_of_another_part_is_not_taken_over() -> None:
    kept, made = make(0, process_group=dist.new_group([0, 1])), make(1)
    step(*kept)
    with pytest.raises(StateMismatchError, match="optimizer updates other parameters here"):
        inventory(*made).adopt(inventory(*kept).manifest())


@pytest.mark.parametrize(
    ("members", "replicas", "same"),
    [
        ((0, 1, 2, 3), (), (1,)),
        ((0, 1), (), (1, 3)),
        ((1, 3), (), (0, 1)),
        ((1, 2), (), (1,)),
        ((0, 1, 2), (), (1,)),
        ((1,), (), ()),
        ((0, 1), (0, 1), (1,)),
        ((0, 1), (1, 2), (1,)),
    ],
)
def test_the_ranks_at_the_same_place_of_other_groups_hold_the_same(
    members: tuple[int, ...], replicas: tuple[int, ...], same: tuple[int, ...]
) -> None:
    assert same_place(members, 1, replicas) == same


def test_a_dimension_between_others_is_a_group_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "12")  # a mesh of 2 x 3 x 2
    assert same_place((1, 3, 5), 3, ()) == (2, 3, 8, 9)


@pytest.mark.parametrize(
    ("members", "same"), [((0, 1), (1, 3)), ((1, 3), (0, 1)), ((0, 1, 2, 3), (1,))], ids=str
)
def test_state_says_who_holds_the_same_and_parameters_are_everybodys(
    members: tuple[int, ...], same: tuple[int, ...]
) -> None:
    world = make(0, process_group=dist.new_group(list(members)))
    step(*world)
    claims = {
        piece.key: piece.info.replicas for piece in inventory(*world).pieces() if ":grad" not in piece.key
    }
    assert {ranks for key, ranks in claims.items() if key.startswith("optimizer.state.")} == {same}
    assert {ranks for key, ranks in claims.items() if key.startswith("model.")} == {()}


@pytest.mark.parametrize("view", [False, True])
def test_a_void_attempt_that_updated_and_froze_a_layer_is_undone(view: bool) -> None:
    model, optimizer = make(0, parameters_as_bucket_view=view)
    held = inventory(model, optimizer)
    snapshot = AttemptSnapshot(held)
    step(model, optimizer)
    optimizer.zero_grad()
    snapshot.begin("step")
    before = bits(held)
    results = []
    for _ in range(2):
        model[1].requires_grad_(False)
        step(model, optimizer)
        results.append(bits(held))
        snapshot.restore()
        assert bits(held) == before
    assert results[0] == results[1]
    model[1].requires_grad_(False)
    step(model, optimizer)
    snapshot.gate()
    optimizer.zero_grad()
    snapshot.begin("step")  # with the new buckets
    before = bits(held)
    step(model, optimizer)
    snapshot.restore()
    assert bits(held) == before


def test_a_replacement_is_told_that_parameters_and_state_are_written_before_the_gate() -> None:
    kept, made = make(0), make(1)
    source, target = inventory(*kept), inventory(*made)
    snapshot = AttemptSnapshot(source)
    for _ in range(2):
        snapshot.begin("step")
        step(*kept)
        snapshot.gate()
        kept[1].zero_grad()
    fill(target, source)
    joined = AttemptSnapshot(target)
    joined.learn(snapshot.written(), ["step"])
    joined.begin("step")
    before = bits(target)
    step(*made)
    assert not joined.unprepared
    joined.restore()
    assert bits(target) == before


def test_one_that_was_loaded_is_not_taken_for_another_optimizer() -> None:
    model, zero = make(0)
    groups = [{**zero.param_groups[0], "params": [*range(8)]}]
    zero.load_state_dict(
        {"state": {n: {"step": torch.tensor(1.0)} for n in range(8)}, "param_groups": groups}
    )
    assert any(zero.state.values())
    check_optimizers([zero, zero.optim], inventory(model, zero), "train.step")
