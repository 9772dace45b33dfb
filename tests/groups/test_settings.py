"""Settings of torch and gloo that change how native groups are built."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpointless_elastic.groups import Situation
from tests.groups.listener import Listener, begin, lose
from tests.groups.processes import LIMIT, Job, Worker


def with_setting(worker: Worker) -> Any:
    """A void group and a group of survivors, under a setting that the test names."""
    name, value, backend = worker.hear()
    if name == "TORCH_DISTRIBUTED_DEBUG":
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    os.environ[name] = value
    worker.registry.install()
    dist.init_process_group(backend, store=worker.store, rank=worker.rank, world_size=worker.size)
    listener = Listener(worker)
    dist.all_reduce(first := torch.ones(1))
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    dist.all_reduce(void := torch.ones(1))
    listener.frozen.wait(LIMIT)
    return first.item(), void.item() in (1.0, 2.0), dist.get_backend()


@pytest.mark.parametrize(
    ("name", "value", "backend"),
    [
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", "gloo"),
        ("GLOO_SOCKET_IFNAME", "lo", "gloo"),
        ("TORCH_GLOO_LAZY_INIT", "1", "gloo"),
        ("UNUSED", "", "cpu:gloo"),
        ("UNUSED", "", None),
    ],
)
def test_a_loss_is_survived_under(name: str, value: str, backend: str | None) -> None:
    with Job(with_setting) as job:
        job.tell((name, value, backend))
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        for first, valid, named in job.results(0, 1):
            assert first == 3.0
            assert valid
            assert named == (backend or "undefined").split(":")[-1] or named == backend


def timeouts(worker: Worker) -> Any:
    listener = begin(worker)
    worker.host.where = Situation.ATTEMPT
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=33))
    dist.group.WORLD.set_timeout(timedelta(seconds=44))
    worker.meet("set")
    worker.registry.abort(frozenset({2}))
    worker.meet("void")
    worker.registry.rebuild(worker.store, 1)
    dist.barrier()
    assert not listener.frozen.is_set()
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_a_changed_timeout_outlives_a_rebuild() -> None:
    with Job(timeouts) as job:
        assert job.results() == [44.0] * 3
