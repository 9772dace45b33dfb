"""Writes the files by which a training script is judged; see benchmarks/harness/__init__.py for the
contract."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(os.environ.get("BENCH_DIR", "."))
STEPS = int(os.environ.get("BENCH_STEPS", "100"))
CHECKPOINT_EVERY = int(os.environ.get("BENCH_CHECKPOINT_EVERY", "0"))


class StepLog:
    """Appends one line per committed step of this rank."""

    def __init__(self, rank: int) -> None:
        self._file = (FOLDER / f"steps-{rank}.log").open("a")

    def committed(self, step: int) -> None:
        self._file.write(f"{time.time_ns()} {step} {os.getpid()}\n")
        self._file.flush()


def write_final(rank: int, state: object) -> None:
    """Writes final-<rank>.pt in one piece, so that a rank killed here leaves no half of a file."""
    save_whole(state, FOLDER / f"final-{rank}.pt")


def save_whole(state: object, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def local_state(holder: nn.Module | torch.optim.Optimizer) -> object:
    """What this rank holds of a module or an optimizer, without the names that DDP adds, or what ZeRO has elsewhere."""
    inner = getattr(holder, "optim", getattr(holder, "module", holder))
    if hasattr(holder, "optim"):  # whose hyperparameters are those of the last step until the next one begins
        holder._sync_param_groups(holder.param_groups, inner.param_groups)
    return _local(inner.state_dict())


def _local(state: object) -> object:
    if hasattr(state, "to_local"):  # a DTensor
        return state.to_local()
    if isinstance(state, dict):
        return {key: _local(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_local(value) for value in state]
    return state
