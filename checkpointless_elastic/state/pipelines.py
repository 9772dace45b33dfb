"""Schedules of torch.distributed.pipelining: their stages meet again after a recovery.

Read in torch 2.13: `torch/distributed/pipelining/schedules.py`. At its first step a schedule has its stages send each
other the shapes of activations, by running a microbatch through them. A replacement has that to do, and needs its
peers for it. So all ranks do it again; what it changes in the modules (statistics of BatchNorm) is put back, since in a
run without a fault it happens once. torch itself puts random states back.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["find", "start_over"]

_MODULE = "torch.distributed.pipelining.schedules"
_INITIALIZERS = ("_initialize_stage", "_initialize_stages")
_FLAGS = (
    "_stage_forward_initialized",
    "_stage_backward_initialized",
    "_stages_forward_initialized",
    "_stages_backward_initialized",
    "_stage_initialized",  # torch before 2.12 has one flag for both
    "_stages_initialized",
)
_found: list[weakref.ref[Any]] = []


def find() -> None:
    """Note the schedules of this process. Looks at all objects, some 10 ms, where the package is in use."""
    base = getattr(sys.modules.get(_MODULE), "_PipelineSchedule", None)
    if base is not None:
        _found[:] = [weakref.ref(one) for one in gc.get_objects() if isinstance(one, base)]


def start_over() -> None:
    """Have the stages of all schedules meet at their next step, without a trace in the modules."""
    for schedule in filter(None, (known() for known in _found)):
        for flag in _FLAGS:
            if hasattr(schedule, flag):
                setattr(schedule, flag, False)
        for name in _INITIALIZERS:
            if hasattr(schedule, name):
                setattr(schedule, name, functools.partial(_without_trace, schedule, name))


def _without_trace(schedule: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """`schedule._initialize_stage`, once; then it is torch's own again."""
    vars(schedule).pop(name, None)
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    buffers = [buffer for stage in stages for buffer in stage.submod.buffers()]
    kept = [buffer.detach().clone() for buffer in buffers]
    initialize: Callable[..., Any] = getattr(schedule, name)
    try:
        return initialize(*args, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
