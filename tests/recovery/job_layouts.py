"""Plain training as DDP, FSDP2 or HSDP has it, on the CPU or with NCCL (DEVICE); see phases.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from phases import DEVICE, Kind, hybrid, join, net, run_job, shard, train, updating
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

join()


def kind_of(model: nn.Module) -> Kind:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updating(optimizer)

    def evaluate(_: int) -> float:
        """A collective of another device type than the model's, where the group has gloo beside NCCL."""
        number = torch.ones(())
        dist.all_reduce(number)
        return float(number)

    return Kind({"model": model, "optimizer": optimizer}, lambda n: train(model, optimizer, n, 1.0), evaluate)


run_job(
    {
        "ddp": lambda: kind_of(DistributedDataParallel(net())),
        "hsdp": lambda: kind_of(shard(net(), hybrid())),
        "fsdp": lambda: kind_of(shard(net(), init_device_mesh(DEVICE, (dist.get_world_size(),)))),
    }
)
