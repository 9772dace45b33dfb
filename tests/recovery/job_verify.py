"""Trains by DDP, or by HSDP with LAYOUT=hsdp, on ranks whose memory goes bad as FLIPS says: "rank:step:what,...".

One bit of the first parameter ("weight") or of what the optimizer keeps for it ("moment") changes, once, just before
that step; or the rank dies there ("kill"). At the end each rank writes its state to OUT/final-RANK.pt.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce
from checkpointless_elastic.state.sharding import local

OUT = Path(os.environ["OUT"])
STEPS = 8


def flip(step: int) -> None:
    """Bit 13 of a number in the middle: too small a change to be seen in a loss."""
    for fault in filter(None, os.environ.get("FLIPS", "").split(",")):
        rank, at, what = fault.split(":")
        mark = OUT / fault.replace(":", "-")
        if (int(rank), int(at)) == (dist.get_rank(), step) and not mark.exists():
            mark.touch()
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            weight = next(model.parameters())
            found = local(weight if what == "weight" else optimizer.state[weight]["exp_avg"])
            bits = found.data.view(-1).view(torch.int32)
            bits[len(bits) // 2] ^= 1 << 13


dist.init_process_group("gloo")
torch.manual_seed(1)
model: nn.Module = nn.Sequential(
    nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 8)
)
if os.environ.get("LAYOUT") == "hsdp":
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
else:
    model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(dist.get_rank())
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def train_step() -> Tensor:
    batch = torch.randn(16, 8)
    loss = (model(batch) - batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


for number in run.steps(STEPS):
    flip(number)
    train_step()
state = {
    key: local(value).detach().clone() for key, value in model.state_dict().items() if "running" not in key
}
moments = [local(value).clone() for kept in optimizer.state.values() for value in kept.values()]
torch.save(
    {"state": state, "moments": moments, "rng": torch.get_rng_state()}, OUT / f"final-{dist.get_rank()}.pt"
)
dist.destroy_process_group()
