"""What a script's steps use and its Run does not name: a replacement would begin it anew, and differ from then on.

Looked for after the first call of each function with an optimizer step. An object with a ``state_dict()`` of its own
may hold what is not found by name, so with one in the Run nothing is taken to be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from checkpointless_elastic.errors import ConfigError
from checkpointless_elastic.state.accelerator import AcceleratorHolder, accumulates
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.objects import ObjectHolder
from checkpointless_elastic.state.zero import is_zero

__all__ = [
    "check_accumulation",
    "check_optimizers",
    "hook_with_state",
    "moving_number",
    "refuse_uneven_inputs",
    "unnamed_scheduler",
]


def check_optimizers(used: Iterable[Optimizer], inventory: Inventory, name: str) -> None:
    """Raise ConfigError for an optimizer that keeps state which the Run does not know. ``name``: of the function."""
    if _has_others(inventory):
        return
    known = {id(container) for container in inventory.scan().containers}
    for optimizer in used:
        keeps = any(optimizer.state.values()) and not is_zero(
            optimizer
        )  # the one in it, which steps too, does
        if keeps and id(optimizer.state) not in known:
            raise ConfigError(
                f"The {type(optimizer).__name__} that steps in {name} is not in the Run, and what it keeps would be "
                "lost with a rank: name it, as in Run(model=model, optimizer=optimizer)."
            )


def check_accumulation(inventory: Inventory) -> None:
    """Raise ConfigError if Accelerate counts calls up to the next update, and the Run does not know the count."""
    if accumulates() and not any(isinstance(holder, AcceleratorHolder) for holder in inventory.holders):
        raise ConfigError(
            "Accelerate accumulates gradients, and a replacement would begin to count anew: name the Accelerator in "
            "the Run, as in Run(..., accelerator=accelerator)."
        )


def unnamed_scheduler(used: Iterable[Any], inventory: Inventory, name: str) -> str:
    """A warning if torch's schedulers set a learning rate, and the Run names none; else ''."""
    if _has_others(inventory) or not any(hasattr(each.step, "_wrapped_by_lr_sched") for each in used):
        return ""
    return (
        f"A learning rate scheduler belongs to the optimizer that steps in {name}, and none is in the Run: a "
        "replacement would begin its schedule anew. Name it, as in Run(..., scheduler=scheduler)."
    )


def refuse_uneven_inputs(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Raise ConfigError inside of ``ddp.join()``: a rank without batches would not commit the steps of the others."""
    if any(ddp._join_config.enable for ddp in wrappers):
        raise ConfigError(
            "A replayable function is called inside of join(), where ranks may have different numbers of batches; each "
            "step is committed on every rank. Give all ranks as many batches, as DistributedSampler does."
        )


def hook_with_state(wrappers: Iterable[DistributedDataParallel]) -> str:
    """A warning if a communication hook of one of these keeps something (PowerSGD its errors); else ''."""
    for ddp in wrappers:
        for _, state in getattr(ddp, "_comm_hooks", ()):
            if state is not None and not isinstance(state, dist.ProcessGroup):
                return (
                    f"DDP's communication hook keeps a {type(state).__name__}, which is not restored: a replacement "
                    "begins with a new one, and training differs from then on from a run without the fault."
                )
    return ""


def moving_number(before: Mapping[str, float], now: Mapping[str, float], name: str) -> str:
    """A warning if a call of function `name` changed a number that a module keeps in an attribute; else ''."""
    for key, number in before.items():
        if now.get(key, number) != number:
            return (
                f"{name} changes {key}, a number that is no tensor: it stays changed where a step is done again, and a "
                "replacement begins with its first value. Make it a buffer of its module if results depend on it."
            )
    return ""


def _has_others(inventory: Inventory) -> bool:
    return any(isinstance(holder, ObjectHolder) for holder in inventory.holders)
