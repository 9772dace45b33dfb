"""On which device the jobs train, and how they join: BENCH_DEVICE is "cpu" (gloo) or "cuda" (NCCL, and gloo beside it).

NCCL takes several ranks on one GPU only if it believes them to be on different hosts (NCCL_HOSTID), or, from 2.30 on,
with NCCL_MULTI_RANK_GPU_ENABLE=1: BENCH_SHARING is "hostid" or "multirank". Both must be set before NCCL starts."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

KIND = os.environ.get("BENCH_DEVICE", "cpu")
LIMIT = timedelta(seconds=120)


def choose(rank: int, ranks: int) -> torch.device:
    """The device of a rank on this machine, made current, with what NCCL must know if it is not the only one there."""
    if KIND == "cpu":
        return torch.device("cpu")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same bits in each run
    torch.cuda.init()
    count = torch.cuda.device_count()
    if ranks > count and os.environ.get("BENCH_SHARING", "hostid") == "multirank":
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    elif ranks > count:
        os.environ["NCCL_HOSTID"] = f"rank-{rank}"
    device = torch.device("cuda", rank % count)
    torch.cuda.set_device(device)
    return device


def backend() -> str:
    """As `init_process_group` takes it."""
    return "gloo" if KIND == "cpu" else "cpu:gloo,cuda:nccl"


def join(**options: Any) -> torch.device:
    """This process becomes a rank of the job that torchrun started, on its device."""
    device = choose(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group(backend(), **options)
    return device


def settle() -> None:
    """Waits for all that was queued on the device."""
    if KIND != "cpu":
        torch.cuda.synchronize()


def rng_states() -> list[torch.Tensor]:
    """Of the CPU's generator and the device's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if KIND != "cpu" else [])]


def native_group(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    """A gloo or NCCL group as torch makes it: not elastic."""
    group: Any = dist.ProcessGroup(store, rank, size)
    kinds = dist.ProcessGroup.BackendType
    if KIND == "cpu":
        made: Any = dist.ProcessGroupGloo(store, rank, size, LIMIT)
    else:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = LIMIT
        made = dist.ProcessGroupNCCL(store, rank, size, options)
    kind = kinds.GLOO if KIND == "cpu" else kinds.NCCL
    group._set_default_backend(kind)
    group._register_backend(torch.device(KIND), kind, made)
    return group
