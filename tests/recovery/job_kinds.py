"""Ways to train, by KIND: two optimizers, a closure, a grad scaler, accumulation in one call and over several, an own
optimizer, no loops, unused parameters, a static graph, torch.compile around forward and backward, groups that come
and go between steps, gradients that stand until the next step begins, a scheduler or an average that goes on between
steps, a sampler whose passes begin with a broadcast, generators of the script, a thread that asks other ranks, a
manual data parallel loop. Rank 1 dies once at step 4, at the moment that DIE names."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

import checkpointless_elastic as ce

OUT, KIND, DIE = os.environ["OUT"], os.environ["KIND"], os.environ.get("DIE", "")
STEPS = 9

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(3)


def moment(name: str) -> None:
    if (rank, run.step, name) != (1, 4, DIE):
        return
    try:
        os.close(os.open(f"{OUT}/died", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Own(torch.optim.Optimizer):
    """An optimizer of the user's, which defines `step` itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("average", torch.zeros_like(param))
                average.mul_(0.9).add_(param.grad)
                param.sub_(average, alpha=group["lr"])


class Branches(nn.Module):
    """A model of which every second step leaves a part unused."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(16, 4), nn.Linear(16, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if run.step % 2 else self.one(x) + self.two(x)


def mlp(inputs: int = 16, outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, outputs))


def batch() -> torch.Tensor:
    return torch.randn(8, 16)


model: Any = DistributedDataParallel(
    Branches() if KIND == "unused" else mlp(),
    find_unused_parameters=KIND == "unused",
    static_graph=KIND in ("static", "compiled"),
)
optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-2)
protected: dict[str, Any] = {"model": model, "optimizer": optimizer}
if KIND in ("gan", "parts"):
    other: Any = DistributedDataParallel(mlp(4, 1))
    other_optimizer = torch.optim.RMSprop(other.parameters(), lr=1e-2)
    protected |= {"other": [other, other_optimizer]}
if KIND == "own":
    optimizer = Own(model.parameters())
    protected["optimizer"] = optimizer
if KIND == "scaler":
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    protected["scaler"] = scaler
if KIND == "manual":
    model = mlp()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    protected = {"model": model, "optimizer": optimizer}
if KIND == "parts":
    protected = {"first": model.module[0], "last": model.module[3], "optimizer": optimizer}
    protected |= {"other": [other.module, other_optimizer]}
if KIND == "inner":
    protected["model"] = model.module
if KIND == "outside":
    protected["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
if KIND == "average":
    protected["average"] = torch.optim.swa_utils.AveragedModel(model)
noise, jitter = torch.Generator().manual_seed(rank), np.random.default_rng(rank)
run = ce.Run(**protected, drawn=[noise, jitter]) if KIND == "drawn" else ce.Run(**protected)
torch.manual_seed(10 + rank)


def loss_of(x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def train_gan(x: torch.Tensor) -> None:
    moment("forward")
    other(model(x).detach()).mean().backward()
    moment("backward")
    other_optimizer.step()
    moment("between")
    (-other(model(x)).mean()).backward()
    moment("late")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()
    other_optimizer.zero_grad()


train_parts = train_gan


def train_closure(x: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(x)
        moment("forward")
        loss.backward()
        moment("backward")
        return loss

    optimizer.step(closure)
    moment("stepped")


def train_scaler(x: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(x)
    moment("forward")
    scaler.scale(loss * (float("inf") if scaler.get_scale() == 2048.0 else 1.0)).backward()
    moment("backward")
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    moment("stepped")
    optimizer.zero_grad(set_to_none=False)


@functools.partial(torch.compile, backend="aot_eager")
def forward_and_backward(x: torch.Tensor) -> None:
    loss_of(x).backward()


def train_compiled(x: torch.Tensor) -> None:
    moment("forward")
    forward_and_backward(x)
    moment("backward")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()


def train_zerofirst(x: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss_of(x).backward()
    optimizer.step()


def train_accumulate(x: torch.Tensor) -> None:
    with model.no_sync():
        loss_of(x).backward()
    moment("forward")
    loss_of(x + 1).backward()
    moment("backward")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()


@run.replayable
def gather(x: torch.Tensor) -> None:
    with model.no_sync():
        loss_of(x).backward()
    moment("gathered")


@run.replayable
def finish(x: torch.Tensor) -> None:
    loss_of(x + 1).backward()
    moment("backward")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()


def train_several(x: torch.Tensor) -> None:
    gather(x)
    moment("between")
    finish(x)
    moment("finished")


def train_drawn(x: torch.Tensor) -> None:
    x = x + torch.randn(x.shape, generator=noise) * jitter.random()
    moment("forward")
    train_plainly(x)


def train_manual(x: torch.Tensor) -> None:
    loss_of(x).backward()
    moment("forward")
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
    moment("backward")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()


def train_plainly(x: torch.Tensor) -> None:
    loss = loss_of(x)
    moment("forward")
    loss.backward()
    moment("backward")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()


def stream() -> Iterator[torch.Tensor]:
    while True:
        yield batch()


class Dealt(Sampler[int]):
    """Each rank's part of an order that rank 0 draws when a pass begins."""

    def __iter__(self) -> Iterator[int]:
        dist.broadcast(order := torch.randperm(24), 0)
        yield from order[rank::2].tolist()

    def __len__(self) -> int:
        return 12


def ask_around() -> list[int]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, rank, group=aside)
    stepped.wait()  # a rank may be lost meanwhile
    stepped.clear()
    dist.all_gather_object(found, rank, group=aside)
    return found


if KIND == "apart":
    aside, pool, stepped = dist.new_group(), ThreadPoolExecutor(1), threading.Event()
train = globals().get(f"train_{KIND}", train_plainly)
train = train if KIND == "several" else run.replayable(train)
if KIND == "dealt":
    samples = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
    loader: Any = DataLoader(samples, batch_size=4, sampler=Dealt())  # type: ignore[arg-type]
    for _ in run.epochs(STEPS // 3):
        for x in run.batches(loader):
            train(x)
elif KIND == "iterable":
    for number, x in run.numbered(stream()):
        train(x)
        if number + 1 == STEPS:
            break
else:
    for _ in run.steps(STEPS):
        if KIND == "zerofirst" and rank == 2 and run.step == 4:
            time.sleep(1.0)  # it hears of the loss before it begins this step, in which the others are
        if KIND == "outside":
            protected["scheduler"].step()
        if KIND == "average":
            protected["average"].update_parameters(model)
        moment("start")
        asked = pool.submit(ask_around) if KIND == "apart" else None
        train(batch())
        if asked is not None:
            stepped.set()
            try:
                assert asked.result() == [0, 1]
            except ce.RankLostError as error:
                print(error)
        if KIND == "passing":
            group = dist.new_group()
            dist.barrier(group)
            dist.destroy_process_group(group)
final = {name: value.state_dict() for name, value in protected.items() if not isinstance(value, list)}
final["other"] = [part.state_dict() for part in protected.get("other", [])]
torch.save({"final": final, "rng": torch.get_rng_state(), "step": run.step}, f"{OUT}/final-{rank}.pt")
