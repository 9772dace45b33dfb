"""Trains with state that no other rank holds: shards of FSDP2, or of an optimizer. Dies as DIE says: moment:step,..."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import checkpointless_elastic as ce
from checkpointless_elastic.state.sharding import local

OUT = Path(os.environ["OUT"])
STEPS = 9


def die_if(moment: str) -> None:
    """At most once for each fault, on its rank."""
    for fault in filter(None, os.environ.get("DIE", "").split(",")):
        rank, at, step = fault.split(":")
        mark = OUT / fault.replace(":", "-")
        if (int(rank), at, int(step)) == (dist.get_rank(), moment, run.step) and not mark.exists():
            mark.touch()
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(torch.optim.AdamW):
    """AdamW that can die between two parameters."""

    def _init_group(self, *arguments: object, **named: object) -> bool:
        found = super()._init_group(*arguments, **named)  # type: ignore[arg-type]
        die_if("update")
        return bool(found)


class Layer(nn.Module):
    """A layer in which a rank can die."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda _: die_if("backward"))
        return self.dropout(torch.relu(self.norm(self.linear(x))))


def main() -> None:
    global run
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 24), Layer(24), Layer(24), nn.Linear(24, 8))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = Slow(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    torch.manual_seed(rank)
    run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler)

    @run.replayable
    def step() -> float:
        batch = torch.randn(16, 8)
        loss = (model(batch) - batch).square().mean()
        die_if("forward")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        die_if("after")
        scheduler.step()
        optimizer.zero_grad()
        return float(loss.detach())

    @run.replayable
    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            loss = model(torch.ones(4, 8)).square().mean()
        model.train()
        dist.all_reduce(loss)
        return float(loss)

    seen = []
    for number in run.steps(STEPS):
        die_if("outside")
        seen = [step()]
        if number % 3 == 2:
            seen.append(evaluate())
    state = [local(value).detach().clone() for value in model.state_dict().values()]
    moments = [local(value) for kept in optimizer.state.values() for value in kept.values()]
    torch.save(
        {
            "state": state,
            "moments": moments,
            "seen": seen,
            "rng": torch.get_rng_state(),
            "lr": scheduler.get_last_lr(),
        },
        OUT / f"final-{rank}.pt",
    )
    dist.destroy_process_group()


run: ce.Run
main()
