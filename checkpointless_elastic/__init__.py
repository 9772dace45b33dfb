"""A lost rank costs one step, not one restart.

    torchrun --rdzv-backend checkpointless --nproc-per-node 8 train.py

Surviving workers stay alive when one dies; the step in flight is declared void and computed again; the lost rank is
started anew and gets its state from the others' memory. A script says what must survive with a Run::

    run = checkpointless_elastic.Run(model=model, optimizer=optimizer)

    @run.replayable
    def train_step(batch): ...

    for epoch in run.epochs(3):
        for batch in run.batches(loader):
            train_step(batch)

The names below are the whole public interface. They are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpointless_elastic.errors import (
    CheckpointlessError,
    ConfigError,
    DirectoryError,
    ProtocolError,
    RankLostError,
    ScriptMismatchError,
    StateMismatchError,
    UnsupportedTorchError,
)

if TYPE_CHECKING:
    from checkpointless_elastic.config import Config
    from checkpointless_elastic.worker.run import Run, is_replacement

__all__ = [
    "CheckpointlessError",
    "Config",
    "ConfigError",
    "DirectoryError",
    "ProtocolError",
    "RankLostError",
    "Run",
    "ScriptMismatchError",
    "StateMismatchError",
    "UnsupportedTorchError",
    "is_replacement",
]

_HOMES = {
    "Config": "checkpointless_elastic.config",
    "Run": "checkpointless_elastic.worker.run",
    "is_replacement": "checkpointless_elastic.worker.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
