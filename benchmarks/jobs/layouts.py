"""One model, trained in the ways that large models are: the layouts of scripts that measure or strike jobs.

A layout takes all ranks of the job: ddp (every rank has all), zero (as ddp, but each rank has a part of the optimizer's
state), fsdp (every rank has one shard), hsdp (2 replicas of each
shard), tp (pairs share each layer, data parallel over the pairs), hsdp_tp (2 replicas, shards, pairs), pp (2 stages,
data parallel in each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerator import KIND
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import checkpointless_elastic as ce

LAYOUTS = ("ddp", "zero", "fsdp", "hsdp", "tp", "hsdp_tp", "pp")
WIDTH_IN = 32


class Block(nn.Module):
    """A transformer's feed-forward block. `inside` is called in its forward."""

    def __init__(self, width: int, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)
        self._inside = inside

    def forward(self, x: Tensor) -> Tensor:
        x = self._inside(x)
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Part(nn.Module):
    """Consecutive layers: the whole model, or one stage of it."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(dict(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


@dataclass
class Parallel:
    """A model as its layout has it on this rank.

    Attributes:
        model: what the optimizer trains.
        data_rank, data_ranks: which part of the batches this rank computes, of how many.
        compute: loss and backward of one batch; the loss is 0 where another stage knows it.
        evaluate: the loss without gradients, likewise.
        foreach: whether one call of an optimizer can take all parameters (not if they are on several meshes);
            None: as torch does on its own.
        data_group: ranks that hold the same, where neither DDP nor FSDP says so.
        zero: each rank keeps the optimizer state of a part of the parameters.
    """

    model: nn.Module
    data_rank: int
    data_ranks: int
    compute: Callable[[Tensor], Tensor]
    evaluate: Callable[[Tensor], Tensor]
    foreach: bool | None = True
    data_group: DeviceMesh | None = None
    zero: bool = False

    def optimizer(self, kind: type[Optimizer], params: Iterable[Any], **options: Any) -> Optimizer:
        """An optimizer of this kind for parameters of the model, or groups of them."""
        if not self.zero:
            return kind(params, foreach=self.foreach, **options)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(params, kind, foreach=self.foreach, **options)

    def protect(self, **others: Any) -> ce.Run:
        """A Run of the model and others."""
        run = ce.Run(model=self.model, **others)
        if self.data_group is not None:
            run.declare_replicas(model=self.data_group)
        return run

    def batch(self, step: int, rows: int) -> Tensor:
        """The same rows for a step in every run, whatever was computed before."""
        generator = torch.Generator().manual_seed(step * self.data_ranks + self.data_rank)
        return torch.randn(rows, WIDTH_IN, generator=generator).to(KIND)


def _same(x: Tensor) -> Tensor:
    return x


def build(layout: str, width: int, blocks: int, inside: Callable[[Tensor], Tensor] = _same) -> Parallel:
    """The model on this rank; the default process group must be there."""
    torch.manual_seed(0)
    layers: list[tuple[str, nn.Module]] = [("first", nn.Linear(WIDTH_IN, width))]
    watched = (blocks // 4, blocks - 1 - blocks // 4)  # one in each stage of a pipeline
    layers += [
        (f"block{number}", Block(width, inside if number in watched else _same)) for number in range(blocks)
    ]
    layers += [("last", nn.Linear(width, WIDTH_IN))]
    for _, layer in layers:
        layer.to(KIND)
    made: Parallel = globals()[f"_{layout}"](layers)
    torch.manual_seed(100 + made.data_rank)  # dropout
    return made


def _loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def compute(batch: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(model(batch), batch)
        loss.backward()
        return loss.detach()

    return compute


def _loss_only(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(lambda batch: nn.functional.mse_loss(model(batch), batch))


def _mesh(**sizes: int) -> DeviceMesh:
    return init_device_mesh(KIND, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def plain(model: nn.Module) -> Parallel:
    """Data parallel on all ranks, as the model itself does it."""
    return Parallel(model, dist.get_rank(), dist.get_world_size(), _loss(model), _loss_only(model))


def _ddp(layers: list[tuple[str, nn.Module]]) -> Parallel:
    return plain(DistributedDataParallel(Part(layers)))


def _zero(layers: list[tuple[str, nn.Module]]) -> Parallel:
    return replace(_ddp(layers), zero=True)


def _shard(part: Part, mesh: DeviceMesh) -> Part:
    for name, layer in part.layers.items():
        if name.startswith("block"):
            fully_shard(layer, mesh=mesh)
    return fully_shard(part, mesh=mesh)


def _fsdp(layers: list[tuple[str, nn.Module]]) -> Parallel:
    return plain(_shard(Part(layers), _mesh(shard=dist.get_world_size())))


def _hsdp(layers: list[tuple[str, nn.Module]]) -> Parallel:
    return plain(_shard(Part(layers), _mesh(replicate=2, shard=dist.get_world_size() // 2)))


def _split(part: Part, mesh: DeviceMesh) -> Part:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {}
    for name in part.layers:
        if name.startswith("block"):
            plan[f"layers.{name}.up"] = ColwiseParallel()
            plan[f"layers.{name}.down"] = RowwiseParallel()
        else:
            plan[f"layers.{name}"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(part, mesh, plan)


def _tp(layers: list[tuple[str, nn.Module]]) -> Parallel:
    mesh = _mesh(data=dist.get_world_size() // 2, tp=2)
    model = _split(Part(layers), mesh["tp"])
    return _averaged(model, mesh["data"], _loss(model), _loss_only(model), foreach=False)


def _averaged(
    model: nn.Module,
    data: DeviceMesh,
    compute: Callable[[Tensor], Tensor],
    evaluate: Callable[[Tensor], Tensor],
    foreach: bool = True,
) -> Parallel:
    """Data parallel by hand: DDP takes neither DTensors nor, in torch 2.13, the stages of a pipeline."""

    def compute_and_average(batch: Tensor) -> Tensor:
        loss = compute(batch)
        for param in model.parameters():
            grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
            dist.all_reduce(grad.div_(data.size()), group=data.get_group())
        return loss

    return Parallel(model, data.get_local_rank(), data.size(), compute_and_average, evaluate, foreach, data)


def _hsdp_tp(layers: list[tuple[str, nn.Module]]) -> Parallel:
    mesh = _mesh(replicate=2, shard=dist.get_world_size() // 4, tp=2)
    model = _shard(_split(Part(layers), mesh["tp"]), mesh["replicate", "shard"])
    where, sizes = mesh.get_coordinate(), mesh.shape
    assert where is not None
    data_rank, data_ranks = where[0] * sizes[1] + where[1], sizes[0] * sizes[1]
    return Parallel(model, data_rank, data_ranks, _loss(model), _loss_only(model), foreach=False)


def _pp(layers: list[tuple[str, nn.Module]]) -> Parallel:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    mesh = _mesh(stage=2, data=dist.get_world_size() // 2)
    data, number = mesh["data"], mesh["stage"].get_local_rank()
    half = len(layers) // 2
    part = Part(layers[:half] if number == 0 else layers[half:])
    stage = PipelineStage(part, number, 2, torch.device(KIND), group=mesh.get_group("stage"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)

    def run(way: Callable[..., object], batch: Tensor) -> Tensor:
        if number == 0:
            way(batch)
            return torch.zeros((), device=KIND)
        losses: list[Tensor] = []
        way(target=batch, losses=losses)
        return torch.stack(losses).mean().detach()

    compute, evaluate = partial(run, schedule.step), partial(run, schedule.eval)
    return _averaged(part, data, compute, evaluate)
