"""The job that scripts/chaos strikes: everything that a step may change, small, with a named moment at each
place.

Dropout, AdamW, a scheduler, gradient clipping where torch can, accumulation in each third step, evaluation and
checkpoint saving as replayable functions, all three random number generators in use, shuffled data in epochs.
BENCH_LAYOUT says how the model is spread over the ranks (jobs/layouts.py). The model of ddp, the default, has
BatchNorm too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import layouts
import numpy as np
import torch
import torch.distributed as dist
from faults import Faults
from layouts import Parallel
from steplog import FOLDER, STEPS, StepLog, local_state, save_whole, write_final
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import checkpointless_elastic as ce

LAYOUT = os.environ.get("BENCH_LAYOUT", "ddp")
BATCH, PER_EPOCH, EVALUATE_EVERY, SAVE_EVERY = 8, 10, 4, 7
# torch 2.13 does not take the norm of parameters on several meshes.
CAN_CLIP = LAYOUT not in ("tp", "hsdp_tp")


class Noise(Dataset[Tensor]):
    """Rows made from their index, with a moment at which loading can fail."""

    def __init__(self, length: int, at: Callable[[str], None]) -> None:
        self._length = length
        self._at = at

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        self._at("data")
        return torch.sin(torch.arange(32) * (index + 1) * 0.1) + 0.01 * torch.randn(32)


class Model(nn.Module):
    """The layers of ddp; `inside` is called in the middle of forward."""

    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2))
        self.second = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2))
        self.last = nn.Linear(128, 32)
        self._inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self._inside(self.first(x))))


class Optimizer(torch.optim.AdamW):
    """AdamW with a moment between the updates of its two groups of parameters."""

    at: Callable[[str], None]

    def _init_group(self, group: dict[str, object], *arguments: object, **named: object) -> bool:
        if group is self.param_groups[1]:
            self.at("update")
        return bool(super()._init_group(group, *arguments, **named))


class Moments:
    """Where a fault may strike, at the step that the Run is in."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.run: ce.Run | None = None

    @property
    def step(self) -> int:
        return self.run.step if self.run else 0

    def at(self, moment: str) -> None:
        self._faults.at(moment, self.step)

    def before_gate(self) -> None:
        self._faults.before_gate(self.step)

    def inside(self, x: Tensor) -> Tensor:
        """In the middle of forward, and of the backward that belongs to it."""
        self.at("forward")
        if x.requires_grad:
            x.register_hook(lambda _: self.at("backward"))
        return x


def build(inside: Callable[[Tensor], Tensor]) -> Parallel:
    if LAYOUT != "ddp":
        return layouts.build(LAYOUT, 64, 4, inside)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model(inside))
    return replace(layouts.plain(model), foreach=None)


def make_optimizer(parallel: Parallel, moments: Moments) -> torch.optim.Optimizer:
    params = list(parallel.model.parameters())
    groups = [{"params": params[: len(params) // 3]}, {"params": params[len(params) // 3 :]}]
    betas = (0.9, 0.999)  # OneCycleLR looks for them in the defaults, where ZeRO has what it was given
    optimizer = parallel.optimizer(Optimizer, groups, lr=1e-3, betas=betas)
    getattr(optimizer, "optim", optimizer).at = moments.at
    return optimizer


def seed(number: int) -> None:
    """Ranks that compute the same rows draw the same numbers."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number + 100)


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Gradients are added up on each rank, where the layout knows how to wait with reducing them."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


class Training:
    """The replayable functions, and what they work on."""

    def __init__(
        self,
        run: ce.Run,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        moments: Moments,
    ) -> None:
        self.run, self.parallel, self.model, self.moments = run, parallel, parallel.model, moments
        self.optimizer, self.scheduler = optimizer, scheduler
        self.log = StepLog(dist.get_rank())
        self.step, self.evaluate, self.save = map(run.replayable, (self._step, self._evaluate, self._save))

    def _step(self, batch: Tensor) -> int:
        step = self.run.step
        if step % 4:  # the gradients stand until the next step begins, as in most scripts
            self.optimizer.zero_grad(set_to_none=step % 4 == 1)
        if step % 3 == 1:
            with unreduced(self.model):
                self.parallel.compute(self._noisy(batch.flip(0)))
        self.parallel.compute(self._noisy(batch))
        if CAN_CLIP:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.moments.before_gate()
        self.optimizer.step()
        self.log.committed(step)
        self.moments.at("after gate")
        self.scheduler.step()
        if step % 4 == 3:
            self.optimizer.zero_grad()
        return step

    def _noisy(self, batch: Tensor) -> Tensor:
        return batch + 0.01 * random.random() + 0.01 * float(np.random.rand())

    def _evaluate(self) -> float:
        self.model.eval()
        loss = self.parallel.evaluate(torch.ones(BATCH, 32))
        self.moments.at("evaluation")
        dist.all_reduce(loss)
        self.model.train()
        return float(loss)

    def _save(self) -> None:
        dist.barrier()
        if LAYOUT != "ddp" or dist.get_rank() == 0:
            save_whole(local_state(self.model), FOLDER / f"checkpoint-{dist.get_rank()}.pt")
        self.moments.at("saving")
        dist.barrier()

    def result(self) -> dict[str, object]:
        return {
            "model": local_state(self.model),
            "optimizer": local_state(self.optimizer),
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
    moments = Moments(Faults(FOLDER, rank, ranks))
    moments.at("start")
    dist.init_process_group("gloo")
    parallel = build(moments.inside)
    optimizer = make_optimizer(parallel, moments)
    moments.at("built")
    data = Noise(PER_EPOCH * BATCH * parallel.data_ranks, moments.at)
    sampler: DistributedSampler[Tensor] = DistributedSampler(
        data, parallel.data_ranks, parallel.data_rank, shuffle=True, seed=3
    )
    loader = DataLoader(data, BATCH, sampler=sampler)
    seed(parallel.data_rank)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS + 1)
    run = moments.run = parallel.protect(optimizer=optimizer, scheduler=scheduler)
    training = Training(run, parallel, optimizer, scheduler, moments)
    for epoch in run.epochs(STEPS // PER_EPOCH):
        sampler.set_epoch(epoch)
        for batch in run.batches(loader):
            training.step(batch)
            if run.step % EVALUATE_EVERY == 0:
                training.evaluate()
            if run.step % SAVE_EVERY == 0:
                training.save()
    moments.at("after the loop")
    write_final(rank, training.result())
    training.log.committed(STEPS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
