"""Several ways to train, one after the other in one job of one Run: what the job scripts of sharded models share.

A *kind* is one way to train: its objects, and a step function. All kinds of a job belong to its Run, and each is
trained for some steps. FAULTS says who dies where, as "kind:rank:step:moment,...", once each.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import checkpointless_elastic as ce
from checkpointless_elastic.worker import session

OUT = Path(os.environ["OUT"])
DEVICE = os.environ.get("DEVICE", "cpu")
STEPS = 5
WIDTH = 32


def join() -> None:
    """Joins the job: gloo on the CPU; on CUDA NCCL too, and ranks that share a device name different hosts to it."""
    if DEVICE == "cpu":
        dist.init_process_group("gloo")
        return
    os.environ["NCCL_HOSTID"] = f"rank-{os.environ['RANK']}"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.cuda.init()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl")


class Faults:
    """Kills this process where FAULTS says so, or, at a fault that ends with ":late", waits for a loss elsewhere."""

    def __init__(self) -> None:
        self._planned = set(filter(None, os.environ.get("FAULTS", "").split(",")))
        self.kind, self.step = "", -1

    def moment(self, name: str) -> None:
        """A point at which a rank may die."""
        fault = f"{self.kind}:{dist.get_rank()}:{self.step}:{name}"
        host = session.current()
        while host is not None and not host.shadow and f"{fault}:late" in self._planned:
            if host.is_frozen() or host.generation > 0:
                break
        if fault not in self._planned:
            return
        try:
            os.close(os.open(OUT / f"died-{fault.replace(':', '-')}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        if os.environ.get("LOSES") == "node":
            agent = os.environ["CHECKPOINTLESS_RUN_DIR"].split("checkpointless-")[1].split("-")[0]
            os.kill(int(agent), signal.SIGKILL)
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)


faults = Faults()
moment = faults.moment


@dataclass
class Kind:
    """One way to train.

    Attributes:
        objects: what belongs to the Run.
        step: one replayable training step, by its number.
        after: what follows each step, replayable or not.
        declared: replicas to be declared, by the name inside `objects`.
    """

    objects: dict[str, Any]
    step: Callable[[int], Any]
    after: Callable[[int], Any] | None = None
    declared: dict[str, Any] = field(default_factory=dict)


class Filler(Exception):
    """Raised by a script that checks what its collectives return."""


def check_for_filler(moment_of_attempt: str = "") -> None:
    """Raise where a collective does not give what it must."""
    count = torch.ones((), device=DEVICE)
    dist.all_reduce(count)
    if int(count) != dist.get_world_size():
        raise Filler(moment_of_attempt)


class Probe(nn.Module):
    """Passes its input on; the moments "forward" and "backward" are in it. `checks`: it raises on filler, in both."""

    def __init__(self, checks: bool = False) -> None:
        super().__init__()
        self._checks = checks

    def forward(self, x: Tensor) -> Tensor:
        self._at("forward" if x.requires_grad else "evaluate")
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda grad: self._at("backward"))
        return x

    def _at(self, name: str) -> None:
        moment(name)
        if self._checks:
            check_for_filler(name)


class Block(nn.Module):
    """A feed-forward block with dropout."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def net(checks: bool = False, wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> nn.Sequential:
    """Three blocks, with the probe in the middle."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), wrap(Block()), Probe(checks), wrap(Block()), nn.Linear(WIDTH, WIDTH)
    )


def shard(model: nn.Module, mesh: DeviceMesh, layers: type[nn.Module] | tuple[type[nn.Module], ...] = Block,
          **options: Any) -> nn.Module:  # fmt: skip
    """FSDP2 with a unit for each layer of these types, and one for the rest."""
    for module in model.modules():
        if isinstance(module, layers):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def hybrid() -> DeviceMesh:
    """Two replicas of each shard."""
    return init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def batch(step: int, rows: int = 4) -> Tensor:
    """The same rows for a step and rank in every run."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(rows, WIDTH, generator=generator).to(DEVICE)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """To give the input back."""
    return nn.functional.mse_loss(model(x).float(), x)


def updating(optimizer: torch.optim.Optimizer) -> None:
    """Let the moment "updating" be inside the optimizer's step, after the gate."""
    optimizer.register_step_pre_hook(lambda *_: moment("updating"))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, clip: float = 0.0) -> Tensor:
    """The plain step."""
    loss = loss_of(model, batch(step))
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    moment("computed")
    optimizer.step()
    moment("stepped")
    optimizer.zero_grad()
    return loss.detach()


def run_job(builders: dict[str, Callable[[], Kind]]) -> None:
    """Train the kinds that KINDS names, all without it, and write what they end with."""
    rank = dist.get_rank()
    names = list(filter(None, os.environ.get("KINDS", "").split(","))) or list(builders)
    kinds = {}
    for number, name in enumerate(names):
        torch.manual_seed(number)
        with torch.device(DEVICE):
            kinds[name] = builders[name]()
    run = ce.Run(**{name: kind.objects for name, kind in kinds.items()})
    for name, kind in kinds.items():
        run.declare_replicas(**{f"{name}.{part}": group for part, group in kind.declared.items()})
    torch.manual_seed(100 + rank)
    losses: dict[str, Any] = {}
    for name, kind in kinds.items():
        step = run.replayable(_named(name, kind.step))
        after = kind.after and run.replayable(_named(f"after {name}", kind.after))
        for number in run.steps(STEPS):
            faults.kind, faults.step = name, number
            losses[name] = step(number)
            moment("between")
            if after:
                after(number)
    state = {piece.key: piece.tensor.detach().clone() for piece in run.inventory.pieces()}
    plain = {f"{name}.{key}": value.state_dict() for name, kind in kinds.items()
             for key, value in kind.objects.items() if key.startswith("scheduler")}  # fmt: skip
    final = {"state": state, "plain": plain, "loss": losses[names[-1]], "rng": rng_states()}
    torch.save(final, OUT / f"final-{rank}.pt")
    dist.destroy_process_group()


def rng_states() -> list[Tensor]:
    """Of the CPU's generator and the device's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE != "cpu" else [])]


def _named(name: str, function: Callable[[int], Any]) -> Callable[[int], Any]:
    """The function with a name of its own: a Run tells replayable functions apart by it."""

    def call(number: int) -> Any:
        return function(number)

    call.__qualname__ = name
    return call
