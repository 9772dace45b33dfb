"""State that could not come back is refused, in a sentence that says what to use instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import ConfigError
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.snapshot import AttemptSnapshot


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_is_refused_and_fully_shard_is_named(original: bool) -> None:
    model = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=original, device_id=torch.device("cpu"))
    with pytest.raises(ConfigError, match="model=.*FSDP1.*fully_shard"):
        Inventory({"model": nn.Sequential(model)})


@pytest.mark.usefixtures("alone")
def test_optimizers_that_write_parameters_where_nothing_can_be_taken_back_are_refused() -> None:
    model = DistributedDataParallel(nn.Linear(4, 4))
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(ConfigError, match="optimizer=.*leave overlap_with_ddp off"):
        Inventory({"model": model, "optimizer": zero})
    averager = PeriodicModelAverager(period=2)
    local = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
    with pytest.raises(ConfigError, match="optimizer=.*PostLocalSGDOptimizer"):
        Inventory({"model": model, "optimizer": local})


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("half", [False, True])
def test_gradients_that_fsdp2_has_not_reduced_cannot_go_from_call_to_call(half: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    snapshot = AttemptSnapshot(Inventory({"model": model}))
    snapshot.begin()
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 4)).sum().backward()
    snapshot.restore()  # drops them
    model(torch.ones(2, 4)).sum().backward()
    snapshot.gate()
    with pytest.raises(ConfigError, match="model holds gradients.*inside one replayable function"):
        snapshot.begin()
