"""What a script's steps use must be in its Run: what is found to be missing, and what is not taken for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import ConfigError
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.worker.unnamed import (
    check_optimizers,
    hook_with_state,
    moving_number,
    unnamed_scheduler,
)
from tests.conftest import Launcher

SCRIPT = """
    import torch, torch.distributed as dist, checkpointless_elastic as ce
    dist.init_process_group("gloo")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    run = ce.Run(model=model)

    @run.replayable
    def measure():
        return model(torch.ones(1, 2)).sum().item()

    @run.replayable
    def search():
        inner = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        inner.param_groups[0]["params"][0].sum().backward()
        inner.step()

    @run.replayable
    def train():
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    measure()
    search()
    print("an optimizer that ends with its call is not missed")
    train()
    print("this is not reached")
"""


UNEVEN = """
    import torch, torch.distributed as dist, checkpointless_elastic as ce
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters())
    run = ce.Run(model=model, optimizer=optimizer)

    @run.replayable
    def train():
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with model.join():
        for _ in range(2 + dist.get_rank()):
            train()
"""


def stepped(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_optimizer_with_state_that_the_run_does_not_name_is_refused() -> None:
    model, optimizer = stepped(torch.optim.AdamW)
    with pytest.raises(ConfigError, match="The AdamW that steps in train.step is not in the Run"):
        check_optimizers([optimizer], Inventory({"model": model}), "train.step")


def test_an_optimizer_in_the_run_or_without_state_is_not_missing() -> None:
    model, optimizer = stepped(torch.optim.AdamW)
    check_optimizers([optimizer], Inventory({"model": model, "all": {"adam": optimizer}}), "step")
    model, optimizer = stepped(torch.optim.SGD, lr=0.1)
    check_optimizers([optimizer], Inventory({"model": model}), "step")


def test_an_object_of_the_users_own_may_hold_the_optimizer() -> None:
    model, optimizer = stepped(torch.optim.AdamW)

    class Trainer:
        def state_dict(self) -> dict[str, Any]:
            return optimizer.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            optimizer.load_state_dict(state)

    check_optimizers([optimizer], Inventory({"model": model, "trainer": Trainer()}), "step")


def test_a_scheduler_that_the_run_does_not_name_is_said() -> None:
    model, optimizer = stepped(torch.optim.SGD, lr=0.1)
    assert unnamed_scheduler([optimizer], Inventory({"model": model}), "step") == ""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "none is in the Run" in unnamed_scheduler([optimizer], Inventory({"model": model}), "step")
    assert unnamed_scheduler([optimizer], Inventory({"model": model, "rate": scheduler}), "step") == ""


def test_a_communication_hook_that_keeps_something_is_said(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, keeps = (DistributedDataParallel(nn.Linear(2, 2)) for _ in range(2))
        plain.register_comm_hook(dist.group.WORLD, allreduce_hook)
        keeps.register_comm_hook(PowerSGDState(None), powerSGD_hook)
        assert hook_with_state([plain]) == ""
        assert "keeps a PowerSGDState" in hook_with_state([plain, keeps])
    finally:
        dist.destroy_process_group()


class Cooling(nn.Module):
    """A model that keeps numbers beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(2)
        self.size, self.heat = 2, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.heat *= 0.9
        inner: torch.Tensor = self.inner(x)
        return inner * self.heat


def test_a_number_that_forward_changes_is_said() -> None:
    model = Cooling()
    inventory = Inventory({"model": model})
    before = inventory.numbers()
    assert before == {"model.size": 2, "model.heat": 1.0}
    assert moving_number(before, inventory.numbers(), "train") == ""
    model(torch.ones(3, 2))
    assert "train changes model.heat, a number that is no tensor" in moving_number(
        before, inventory.numbers(), "train"
    )


def test_steps_of_uneven_inputs_are_refused(torchrun: Launcher) -> None:
    finished = torchrun.run(torchrun.script(UNEVEN), ranks=2)
    assert finished.code == 1
    assert "ConfigError: A replayable function is called inside of join()" in finished.err


def test_a_job_whose_run_lacks_the_optimizer_ends_at_the_first_step_that_uses_it(torchrun: Launcher) -> None:
    finished = torchrun.run(torchrun.script(SCRIPT), ranks=1)
    assert finished.code == 1
    assert finished.out.splitlines() == ["an optimizer that ends with its call is not missed"]
    assert "ConfigError: The AdamW that steps in __main__.train is not in the Run" in finished.err
