"""Trains with state that no other rank holds: shards of FSDP2. Dies as DIE says: rank:moment:step,...

With LOSES=node the rank's agent dies, and all of its node with it, with LOSES=torn as soon as it is sending a mirror.
With LOSES=off the rank waits for its end, with LOSES=held its agent dies when the file go-RANK is there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import checkpointless_elastic as ce
from checkpointless_elastic.state.sharding import local

OUT = Path(os.environ["OUT"])
STEPS = 9
BALLAST = int(os.environ.get("BALLAST", "0"))  # MiB of state of each rank that is only kept
LOSES = os.environ.get("LOSES", "rank")
AGENT = int(
    os.environ.get("CHECKPOINTLESS_RUN_DIR", "checkpointless-0-").split("checkpointless-")[1].split("-")[0]
)


def die_if(moment: str) -> None:
    """At most once for each fault, on its rank."""
    for fault in filter(None, os.environ.get("DIE", "").split(",")):
        rank, at, step = fault.split(":")
        mark = OUT / fault.replace(":", "-")
        if (int(rank), at, int(step)) == (dist.get_rank(), moment, run.step) and not mark.exists():
            while LOSES == "torn" and not is_sending(AGENT):
                pass  # a mirror of 48 MiB is sent in some 20 ms
            (OUT / f"held-{rank}").touch()
            while LOSES == "held" and not (OUT / f"go-{rank}").exists():
                time.sleep(0.005)
            mark.touch()
            sys.stdout.flush()
            if LOSES != "off":
                os.kill(os.getpid() if LOSES == "rank" else AGENT, signal.SIGKILL)
            signal.pause()


def is_sending(pid: int) -> bool:
    """Has a socket of this process more to send than any message is long?"""
    links = (os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())
    sockets = {
        link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")
    }
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return any(row[9] in sockets and int(row[4].split(":")[0], 16) > 1 << 20 for row in rows)


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
    (OUT / f"agent-{rank}").write_text(str(AGENT))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 24), Layer(24), Layer(24), nn.Linear(24, 8))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = Slow(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    torch.manual_seed(rank)
    ballast = nn.ParameterList([torch.randn(BALLAST << 18)]).requires_grad_(False)
    run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler, ballast=ballast)
    run.declare_replicas(ballast=[rank])

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
            "ballast": ballast[0].sum(),
            "rng": torch.get_rng_state(),
            "lr": scheduler.get_last_lr(),
        },
        OUT / f"final-{rank}.pt",
    )
    dist.destroy_process_group()


run: ce.Run
main()
