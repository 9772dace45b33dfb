"""The job that scripts/chaos strikes: everything that a step may change, small, with a named moment at each
place.

Dropout, BatchNorm under DDP, AdamW, a scheduler, gradient clipping, accumulation in each third step,
evaluation and checkpoint saving as replayable functions, all three random number generators in use, shuffled
data in epochs."""

from __future__ import annotations

import os
import random
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from faults import Faults
from steplog import FOLDER, STEPS, StepLog, save_whole, write_final
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import checkpointless_elastic as ce

BATCH, PER_EPOCH, EVALUATE_EVERY, SAVE_EVERY = 8, 10, 4, 7


class Noise(Dataset[Tensor]):
    """Rows made from their index, with a moment at which loading can fail."""

    def __init__(self, length: int, faults: Faults) -> None:
        self._length = length
        self._faults = faults
        self.run: ce.Run | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        self._faults.at("data", self.run.step if self.run else 0)
        return torch.sin(torch.arange(32) * (index + 1) * 0.1) + 0.01 * torch.randn(32)


class Model(nn.Module):
    """Some layers, with a moment in the middle of forward and of backward."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2))
        self.second = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2))
        self.last = nn.Linear(128, 32)
        self._faults = faults
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        step, x = self.step, self.first(x)
        self._faults.at("forward", step)
        x = self.second(x)
        if x.requires_grad:
            x.register_hook(lambda _: self._faults.at("backward", step))
        return self.last(x)


class Optimizer(torch.optim.AdamW):
    """AdamW with a moment between the updates of its two groups of parameters."""

    faults: Faults
    at_step = 0

    def _init_group(self, group: dict[str, object], *arguments: object, **named: object) -> bool:
        if group is self.param_groups[1]:
            self.faults.at("update", self.at_step)
        return bool(super()._init_group(group, *arguments, **named))


def build(faults: Faults) -> tuple[DistributedDataParallel, Optimizer]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Model(faults))
    inner = model.module
    groups = [
        {"params": inner.first.parameters()},
        {"params": [*inner.second.parameters(), *inner.last.parameters()]},
    ]
    optimizer = Optimizer(groups, lr=1e-3)
    optimizer.faults = faults
    return model, optimizer


def seed(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank + 100)


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (FOLDER / f"pid-{rank}.partial").write_text(str(os.getpid()))
    (FOLDER / f"pid-{rank}.partial").rename(FOLDER / f"pid-{rank}")
    faults = Faults(FOLDER, rank, ranks)
    faults.at("start", 0)
    dist.init_process_group("gloo")
    model, optimizer = build(faults)
    faults.at("built", 0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS + 1)
    data = Noise(PER_EPOCH * BATCH * ranks, faults)
    sampler: DistributedSampler[Tensor] = DistributedSampler(data, ranks, rank, shuffle=True, seed=3)
    loader = DataLoader(data, BATCH, sampler=sampler)
    seed(rank)
    run = data.run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler)
    log = StepLog(rank)

    @run.replayable
    def train_step(batch: Tensor) -> float:
        step = model.module.step = optimizer.at_step = run.step
        parts = batch.chunk(2) if step % 3 == 1 else (batch,)
        for number, part in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else model.no_sync():
                noisy = part + 0.01 * random.random() + 0.01 * float(np.random.rand())
                nn.functional.mse_loss(model(noisy), part).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        faults.before_gate(step)
        optimizer.step()
        log.committed(step)
        faults.at("after gate", step)
        scheduler.step()
        optimizer.zero_grad()
        return step

    @run.replayable
    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        loss = model.module(torch.ones(4, 32)).square().mean()
        faults.at("evaluation", run.step)
        dist.all_reduce(loss)
        model.train()
        return float(loss)

    @run.replayable
    def save() -> None:
        dist.barrier()
        if rank == 0:
            save_whole(model.module.state_dict(), FOLDER / "checkpoint.pt")
        faults.at("saving", run.step)
        dist.barrier()

    for epoch in run.epochs(STEPS // PER_EPOCH):
        sampler.set_epoch(epoch)
        for batch in run.batches(loader):
            train_step(batch)
            if run.step % EVALUATE_EVERY == 0:
                evaluate()
            if run.step % SAVE_EVERY == 0:
                save()
    faults.at("after the loop", STEPS)
    write_final(
        rank,
        {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "python": str(random.getstate()),
            "numpy": str(np.random.get_state()),
        },
    )
    log.committed(STEPS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
