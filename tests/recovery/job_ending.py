"""Loses a rank, leaves process groups that a recovery did not connect, and ends without destroying any."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

OUT = Path(os.environ["OUT"])
dist.init_process_group("gloo")
rank = dist.get_rank()
unused = [dist.new_group() for _ in range(2)]
model = DistributedDataParallel(nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def step(number: int) -> None:
    loss = model(torch.randn(4, 8)).square().mean()
    if number == 2 and rank == 1 and not (OUT / "died").exists():
        (OUT / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


for number in run.steps(4):
    step(number)
dist.barrier(unused[0])


@atexit.register
def tell() -> None:
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    (OUT / f"threads-{rank}").write_text(" ".join(names))
