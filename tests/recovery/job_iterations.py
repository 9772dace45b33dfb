"""A loop of run.steps whose iterations differ; rank 1 dies where FAULTS says, "step:moment", separated by commas.

What follows a step in an iteration is written to OUT/after-RANK.log: a replacement must not do it again.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

OUT = Path(os.environ["OUT"])
FAULTS = set(os.environ.get("FAULTS", "").split(","))

dist.init_process_group("gloo")
rank = dist.get_rank()


def moment(step: int, name: str) -> None:
    if rank != 1 or f"{step}:{name}" not in FAULTS:
        return
    try:
        os.close(os.open(OUT / f"died-{step}-{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(rank)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def train(step: int) -> float:
    loss = model(torch.randn(4, 8)).pow(2).sum()
    moment(step, "forward")
    loss.backward()
    optimizer.step()
    moment(step, "stepped")
    optimizer.zero_grad()
    return float(next(model.parameters()).sum())  # the same on all ranks


log = open(OUT / f"after-{rank}.log", "a")
for step in run.steps(14):
    moment(step, "top")
    if step == 4:  # an iteration without a step
        continue
    value = train(step)
    moment(step, "returned")
    if step == 6:  # a loop without an item
        list(run.batches([]))
    if step == 8:
        dist.all_reduce(total := torch.tensor(value))
        value = float(total)
    if step == 10:
        torch.rand(1)
    if step == 11:
        value = train(-step)
    log.write(f"{step} {value}\n")
    log.flush()
torch.save(
    {"model": model.state_dict(), "rng": torch.get_rng_state(), "values": run.step},
    OUT / f"final-{rank}.pt",
)
dist.destroy_process_group()
