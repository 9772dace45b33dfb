"""HSDP (FSDP2 on a mesh of 2 replicas), trained in the ways that real scripts do; see phases.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from experts import experts
from phases import (
    DEVICE,
    WIDTH,
    Block,
    Kind,
    Probe,
    batch,
    check_for_filler,
    hybrid,
    join,
    loss_of,
    moment,
    net,
    run_job,
    shard,
    train,
    updating,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

join()
mesh = hybrid()


def accumulate() -> Kind:
    """Clipping, accumulation in one call, a scheduler, evaluation between steps."""
    model = shard(net(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def step(number: int) -> Tensor:
        loss = torch.zeros((), device=DEVICE)
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            part = loss_of(model, batch(10 * number + micro))
            part.backward()
            moment(f"micro{micro}")
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        moment("stepped")
        scheduler.step()
        optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def evaluate(number: int) -> Tensor:
        model.eval()
        loss = loss_of(model, batch(-number - 1))
        moment("evaluated")
        dist.all_reduce(loss)
        model.train()
        return loss

    return Kind({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step, evaluate)


class Recomputed(nn.Module):
    """A block whose forward is done again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def recompute() -> Kind:
    """Activation checkpointing of both kinds, bf16 and fused AdamW."""
    model = nn.Sequential(checkpoint_wrapper(Block()), Probe(), Recomputed(), nn.Linear(WIDTH, WIDTH))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(model, mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    updating(optimizer)
    return Kind({"model": model, "optimizer": optimizer}, lambda n: train(model, optimizer, n, clip=1.0))


class Average(nn.Module):
    """A small head, the same on all ranks, and the moving average of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )


def frozen() -> Kind:
    """SGD with momentum, frozen base weights, and beside it a replicated head with Adafactor and a moving average."""
    model = net()
    for block in (model[0], model[1]):
        block.requires_grad_(False)
    model = shard(model, mesh)
    side = Average()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    other = torch.optim.Adafactor(side.head.parameters(), lr=1e-2)  # its step is not for sharded tensors
    updating(other)

    def step(number: int) -> Tensor:
        x = batch(number)
        hidden = model(x + x.mean().requires_grad_())
        loss = nn.functional.mse_loss(side.head(hidden), x)
        loss.backward()
        for param in side.head.parameters():
            assert param.grad is not None
            dist.all_reduce(param.grad)
        optimizer.step()
        moment("between steps")
        other.step()
        moment("stepped")
        side.average.update_parameters(side.head)
        optimizer.zero_grad()
        other.zero_grad()
        return loss.detach()

    return Kind({"model": model, "side": side, "optimizers": [optimizer, other]}, step)


def adversary() -> Kind:
    """Two models with an optimizer each."""
    made, judge = shard(net(), mesh), shard(nn.Sequential(Block(), nn.Linear(WIDTH, 1)), mesh)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    other = torch.optim.NAdam(judge.parameters(), lr=1e-2)
    updating(optimizer)
    updating(other)

    def step(number: int) -> Tensor:
        x = batch(number)
        (judge(made(x).detach()) - judge(x)).mean().backward()
        other.step()
        moment("between steps")
        loss = -judge(made(x)).mean()
        loss.backward()
        optimizer.step()
        moment("stepped")
        optimizer.zero_grad()
        other.zero_grad()
        return loss.detach()

    return Kind({"models": [made, judge], "optimizers": {"a": optimizer, "b": other}}, step)


def compiled() -> Kind:
    """Compiled blocks, without a compiler of code."""
    model = shard(net(wrap=lambda block: (block.compile(backend="aot_eager"), block)[1]), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Kind({"model": model, "optimizer": optimizer}, lambda n: train(model, optimizer, n))


def communicating(made: Any) -> Kind:
    """An optimizer whose step has collectives, since it needs more than the shards."""
    model = shard(net(), mesh)
    matrices = [param for param in model.parameters() if param.dim() == 2]
    optimizer = made(matrices)
    updating(optimizer)
    return Kind({"model": model, "optimizer": optimizer}, lambda n: train(model, optimizer, n))


def checking() -> Kind:
    """A script that raises when a collective gives filler, in the middle of forward, of backward, or between."""
    model = shard(net(checks=True), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> Tensor:
        model.set_requires_gradient_sync(False)
        loss_of(model, batch(number)).backward()
        moment("between batches")
        check_for_filler("between batches")
        model.set_requires_gradient_sync(True)
        return train(model, optimizer, number + 50)

    return Kind({"model": model, "optimizer": optimizer}, step)


run_job(
    {
        "accumulate": accumulate,
        "recompute": recompute,
        "frozen": frozen,
        "adversary": adversary,
        "compiled": compiled,
        "muon": lambda: communicating(lambda params: torch.optim.Muon(params, lr=1e-2)),
        "checking": checking,
        "experts": experts,
    }
)
