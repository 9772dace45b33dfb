"""Accumulates gradients over several calls, so that each rank has more private state than fits a message.

With DIE rank 1 kills the agent of its node, once, when it has accumulated in step 2. Results go to OUT/final-RANK.pt.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import checkpointless_elastic as ce

OUT, SIZE = Path(os.environ["OUT"]), 10_000_000

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
model = nn.Linear(SIZE, 1, bias=False)
with torch.no_grad():
    model.weight.fill_(0.5)
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
run = ce.Run(model=model, ddp=ddp, optimizer=optimizer)


def strike(step: int) -> None:
    marker = OUT / "struck"
    if (rank, step) != (1, 2) or not os.environ.get("DIE") or marker.exists():
        return
    marker.touch()
    agent = os.environ["CHECKPOINTLESS_RUN_DIR"].split("checkpointless-")[1].split("-")[0]
    os.kill(int(agent), signal.SIGKILL)
    signal.pause()


@run.replayable
def accumulate(x: torch.Tensor) -> None:
    with ddp.no_sync():
        ddp(x).sum().backward()


@run.replayable
def finish(x: torch.Tensor, step: int) -> None:
    ddp(x).sum().backward()
    strike(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


for step in run.steps(4):
    for _ in range(2):
        accumulate(torch.rand(1, SIZE))
    finish(torch.rand(1, SIZE), step)
torch.save({"model": model.state_dict(), "rng": torch.get_rng_state()}, OUT / f"final-{rank}.pt")
dist.destroy_process_group()
