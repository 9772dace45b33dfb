"""Loaded by each Python of a job of `test_pytorch_examples`, before a script that knows nothing of it.

Without a GPU it lets what the scripts call a GPU be the CPU. It seeds when the process group is made, since some
scripts draw their data and weights without a seed; kills this process as KILL="rank:step" says, once, after so many
optimizer steps; and writes the parameters that the script ends with to OUT/final-RANK.pt.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

ACCELERATOR = {
    "is_available": True,
    "device_count": 8,
    "current_accelerator": torch.device("cpu"),
    "set_device_index": None,
    "device_index": None,
}
OUT = Path(os.environ["OUT"])
_last: list[Optimizer] = []
_steps = 0


def changed(owner: Any, name: str, change: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let `owner.name` be called with what `change` makes of its arguments."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def call(*args: Any, **named: Any) -> Any:
        args, named = change(args, named)
        return before(*args, **named)

    setattr(owner, name, call)


def answered(owner: Any, name: str, answer: Any) -> None:
    """Let `owner.name` give `answer`, but tell torch and this project the truth."""
    before = getattr(owner, name)

    @functools.wraps(before)
    def call(*args: Any, **named: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return before(*args, **named) if caller in ("torch", "checkpointless_elastic") else answer

    setattr(owner, name, call)


def without(*names: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    return lambda args, named: (args, {key: value for key, value in named.items() if key not in names})


def on_cpu(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """For `.to(device)` and `torch.load(..., map_location)`."""
    return tuple(map(_place, args)), {key: _place(value) for key, value in named.items()}


def _place(value: Any) -> Any:
    if isinstance(value, (str, torch.device)):
        return "cpu" if str(value).startswith(("cuda", "cpu:")) else value
    return "cpu" if type(value) is int else value


def joining(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    backend = named.pop("backend", args[0] if args else None)
    return ("gloo" if backend == "nccl" else backend, *args[1:]), without("device_id")((), named)[1]


def pretend() -> None:
    """The CPU stands for eight accelerators."""
    torch.cuda.set_device = lambda *_: None
    for name, answer in ACCELERATOR.items():
        answered(torch.accelerator, name, answer)
    for owner in (torch.Tensor, torch.nn.Module):
        changed(owner, "to", on_cpu)
    changed(torch, "load", on_cpu)
    changed(DistributedDataParallel, "__init__", without("device_ids"))
    changed(DataLoader, "__init__", without("pin_memory"))
    for owner in (dist, device_mesh):
        changed(owner, "init_process_group", joining)


def stepped(optimizer: Optimizer, *_: Any) -> None:
    global _steps
    _last[:], _steps = [optimizer], _steps + 1
    mark = OUT / "killed"
    if os.environ.get("KILL") == f"{os.environ['RANK']}:{_steps}" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def write() -> None:
    for optimizer in _last:
        kept = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
        local = [value.to_local() if isinstance(value, DTensor) else value for value in kept]
        torch.save({"parameters": local, "state": optimizer.state_dict()["param_groups"]},
                   OUT / f"final-{os.environ['RANK']}.pt")  # fmt: skip


if not torch.cuda.is_available():
    pretend()
register_optimizer_step_post_hook(stepped)
atexit.register(write)
