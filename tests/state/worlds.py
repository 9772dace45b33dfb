"""Small training set-ups that the tests of state share: each is built the same way on a source and a replacement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from checkpointless_elastic.state.inventory import Inventory


class Net(nn.Module):
    """Convolution in channels_last, BatchNorm, LSTM, tied weights, a frozen layer, buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(16, 8)
        self.up = nn.Linear(8, 8, bias=False)
        self.down = nn.Linear(8, 8, bias=False)
        self.down.weight = self.up.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("scalar", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("low", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.ones(1, 4, dtype=torch.bool).expand(3, 4))
        self.register_buffer("waves", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("middle", torch.zeros(4, 4)[:, 1:3])

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.hidden += data.mean()
            self.scalar += 1
            self.middle.mul_(0.5).add_(1.0)
        features = self.norm(self.conv(data)).flatten(2)
        output, _ = self.lstm(features)
        output = nn.functional.dropout(output, 0.1, self.training)
        return torch.as_tensor(self.frozen(self.down(torch.tanh(self.up(output)))))


@dataclass
class World:
    """A model and what trains it."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def inventory(self) -> Inventory:
        objects = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return Inventory({**objects, **self.extra})

    def step(self, data: torch.Tensor) -> None:
        self.model(data).square().mean().backward()
        self.optimizer.step()
        if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
            self.scheduler.step(float(data.sum()))
        elif self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        if "ema" in self.extra:
            self.extra["ema"].update_parameters(self.model)


def build(
    seed: int,
    optimizer: Callable[[Any], Optimizer],
    scheduler: Callable[[Optimizer], Any] | None = None,
) -> World:
    """A world with parameters drawn from the seed."""
    torch.manual_seed(seed)
    model = Net()
    made = optimizer([param for param in model.parameters() if param.requires_grad])
    return World(model, made, scheduler(made) if scheduler else None)


def batches(count: int) -> Iterator[torch.Tensor]:
    """The same batches at every call."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.randn(4, 2, 4, 4, generator=generator)


def fill(target: Inventory, source: Inventory) -> None:
    """Take over the state of `source`, without a segment in between."""
    manifest = source.manifest()
    target.adopt(manifest)
    theirs = source.pieces()
    for mine, other in zip(target.pieces(), theirs, strict=True):
        flat = mine.tensor.detach()
        for dim in range(flat.dim()):
            if flat.stride(dim) == 0 and flat.size(dim) > 1:
                flat = flat.narrow(dim, 0, 1)
        flat.copy_(other.tensor.detach()[tuple(slice(0, size) for size in flat.shape)])
    target.load_meta(manifest)


def bits(inventory: Inventory) -> dict[str, bytes]:
    """All state, as bytes by name."""
    found = {}
    for piece in inventory.pieces():
        flat = piece.tensor.detach().contiguous().view(-1)
        found[piece.key] = bytes(flat.view(torch.uint8).tolist()) + repr(piece.info).encode()
    return found


def plain(inventory: Inventory) -> dict[str, Any]:
    """All state that is not a tensor."""
    return {holder.name: copy.deepcopy(holder.plain()) for holder in inventory.holders}
