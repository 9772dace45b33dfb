"""Trains with all that a job of ours may have open: loader processes, mirrors, segments of a transfer, unix sockets.

Writes a line per step to OUT/steps, and "joining" there when a replacement has reached this line. STEPS: how many;
DIE="rank:step:kind" is a fault of that rank, once: "kill", or "raise" every time. A replacement waits for the file
OUT/go-join, if HOLD is set.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import checkpointless_elastic as ce

OUT = Path(os.environ["OUT"])
STEPS = int(os.environ.get("STEPS", "1000000"))
WIDTH = 64


def write(line: str) -> None:
    with open(OUT / "steps", "a") as file:
        file.write(f"{line}\n")


def die(rank: int, step: int) -> None:
    fault, mark = os.environ.get("DIE", ""), OUT / "died"
    if not fault.startswith(f"{rank}:{step}:"):
        return
    if fault.endswith("raise"):
        raise ValueError("an error of the script")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.multiprocessing.set_sharing_strategy(os.environ.get("STRATEGY", "file_descriptor"))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    replicated = DistributedDataParallel(nn.Linear(WIDTH, WIDTH))
    sharded = nn.Linear(WIDTH, WIDTH)
    fully_shard(sharded)
    parameters = [*replicated.parameters(), *sharded.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    run = ce.Run(replicated=replicated, sharded=sharded, optimizer=optimizer)
    if ce.is_replacement():
        write("joining")
        while "HOLD" in os.environ and not (OUT / "go-join").exists():
            time.sleep(0.01)
    rows = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(rows), batch_size=4, num_workers=2, persistent_workers=True)

    @run.replayable
    def step(batch: Tensor) -> None:
        die(rank, run.step)
        loss = (sharded(replicated(batch)) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in run.epochs(STEPS):
        for (batch,) in run.batches(loader):
            step(batch)
            write(f"{rank} {run.step}")
            if run.step >= STEPS:
                dist.destroy_process_group()
                return


main()
