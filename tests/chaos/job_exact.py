"""Trains for STEPS short steps with small whole numbers, so that anyone can say what each rank ends with.

The gradient of step n on rank r is n % 3 + 2 r; with SGD at a rate of 1, N ranks take its mean away in each step, which
is n % 3 + N - 1.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

dist.init_process_group("gloo")
rank = dist.get_rank()
net = nn.Linear(8, 1, bias=False)
nn.init.zeros_(net.weight)
model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def train_step() -> None:
    time.sleep(0.02)
    optimizer.zero_grad()
    model(torch.full((1, 8), float(run.step % 3 + 2 * rank))).sum().backward()
    optimizer.step()


for _ in run.steps(int(os.environ["STEPS"])):
    train_step()
torch.save({"weight": net.weight.data}, f"{sys.argv[1]}/final-{rank}.pt")
dist.destroy_process_group()
