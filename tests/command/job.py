"""Trains, two steps a second until the file OUT/hurry is there, then as fast as it can."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

OUT, STEPS = Path(os.environ["OUT"]), int(os.environ["STEPS"])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def train_step() -> None:
    if not (OUT / "hurry").exists():
        time.sleep(0.5)
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


log = (OUT / f"steps-{rank}.log").open("a")
for step in run.steps(STEPS):
    train_step()
    log.write(f"{os.getpid()} {step}\n")
    log.flush()
final = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
torch.save(final, OUT / f"final-{rank}.pt")
dist.destroy_process_group()
