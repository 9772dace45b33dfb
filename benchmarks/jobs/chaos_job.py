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


class Training:
    """The replayable functions, and what they work on."""

    def __init__(
        self,
        run: ce.Run,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        faults: Faults,
    ) -> None:
        self.run, self.model, self.faults = run, model, faults
        self.optimizer, self.scheduler = optimizer, scheduler
        self.log = StepLog(dist.get_rank())
        self.step, self.evaluate, self.save = map(run.replayable, (self._step, self._evaluate, self._save))

    def _step(self, batch: Tensor) -> int:
        step = self.model.module.step = self.optimizer.at_step = self.run.step
        parts = batch.chunk(2) if step % 3 == 1 else (batch,)
        for part in parts:
            with nullcontext() if part is parts[-1] else self.model.no_sync():
                noisy = part + 0.01 * random.random() + 0.01 * float(np.random.rand())
                nn.functional.mse_loss(self.model(noisy), part).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.faults.before_gate(step)
        self.optimizer.step()
        self.log.committed(step)
        self.faults.at("after gate", step)
        self.scheduler.step()
        self.optimizer.zero_grad()
        return step

    @torch.no_grad()
    def _evaluate(self) -> float:
        self.model.eval()
        loss = self.model.module(torch.ones(4, 32)).square().mean()
        self.faults.at("evaluation", self.run.step)
        dist.all_reduce(loss)
        self.model.train()
        return float(loss)

    def _save(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            save_whole(self.model.module.state_dict(), FOLDER / "checkpoint.pt")
        self.faults.at("saving", self.run.step)
        dist.barrier()

    def result(self) -> dict[str, object]:
        return {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "python": str(random.getstate()),
            "numpy": str(np.random.get_state()),
        }


def announce(rank: int) -> None:
    """Tells chaos from outside which process this rank is, before anything else can go wrong."""
    path = FOLDER / f"pid-{rank}.partial"
    path.write_text(str(os.getpid()))
    path.rename(FOLDER / f"pid-{rank}")


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    announce(rank)
    faults = Faults(FOLDER, rank, ranks)
    faults.at("start", 0)
    dist.init_process_group("gloo")
    model, optimizer = build(faults)
    faults.at("built", 0)
    data = Noise(PER_EPOCH * BATCH * ranks, faults)
    sampler: DistributedSampler[Tensor] = DistributedSampler(data, ranks, rank, shuffle=True, seed=3)
    loader = DataLoader(data, BATCH, sampler=sampler)
    seed(rank)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS + 1)
    run = data.run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler)
    training = Training(run, model, optimizer, scheduler, faults)
    for epoch in run.epochs(STEPS // PER_EPOCH):
        sampler.set_epoch(epoch)
        for batch in run.batches(loader):
            training.step(batch)
            if run.step % EVALUATE_EVERY == 0:
                training.evaluate()
            if run.step % SAVE_EVERY == 0:
                training.save()
    faults.at("after the loop", STEPS)
    write_final(rank, training.result())
    training.log.committed(STEPS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
