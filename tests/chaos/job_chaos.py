"""Trains for STEPS short steps and writes what each rank ends with, and a line per evaluation, to the folder given."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

OUT, STEPS = Path(sys.argv[1]), int(os.environ["STEPS"])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def train_step() -> None:
    time.sleep(0.02)
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@run.replayable
def save() -> None:
    """Whole or not at all."""
    dist.barrier()
    partial = OUT / f"state-{rank}.partial"
    torch.save(net.state_dict(), partial)
    partial.replace(OUT / f"state-{rank}.pt")


for _ in run.steps(STEPS):
    train_step()
    if run.step % 10 == 0:
        save()
final = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
torch.save(final, OUT / f"final-{rank}.pt")
dist.destroy_process_group()
