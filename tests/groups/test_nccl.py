"""The same on NCCL. Needs a machine with CUDA; several ranks share one GPU under different NCCL host ids."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.groups.listener import Listener, lose
from tests.groups.processes import LIMIT, Job, Worker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: NCCL groups are not verified here"
    ),
]


def start(worker: Worker) -> Listener:
    os.environ["NCCL_HOSTID"] = f"test-{worker.rank}"
    torch.cuda.set_device(worker.rank % torch.cuda.device_count())
    worker.registry.install()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=worker.store, rank=worker.rank, world_size=worker.size
    )
    return Listener(worker)


def survive(worker: Worker) -> Any:
    listener = start(worker)
    dist.all_reduce(first := torch.ones(4, device="cuda"))
    found = [first.tolist()]
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    work = dist.all_reduce(void := torch.ones(4, device="cuda"), async_op=True)
    assert listener.frozen.wait(LIMIT)
    work.wait()
    torch.cuda.synchronize()
    assert void.isfinite().all()
    return [*found, *_after(listener)]


def replace(worker: Worker) -> Any:
    return [[3.0] * 4, *_after(start(worker))]


def _after(listener: Listener) -> list[Any]:
    report = listener.rebuild()
    dist.all_reduce(last := torch.full((4,), 2.0, device="cuda"))
    return [report.rebuilt, last.tolist()]


def test_an_nccl_group_outlives_a_killed_rank() -> None:
    with Job(survive) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, replace, shadow=True)
        job.tell(("rebuild", 1))
        assert job.results() == [[[3.0] * 4, ("0",), [6.0] * 4]] * 3
