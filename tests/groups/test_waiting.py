"""Waits that look up from time to time whether their group has become void."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from checkpointless_elastic.groups import native, waiting
from tests.groups.listener import begin, lose
from tests.groups.processes import LIMIT, Job, Worker

MESSAGES = 40


def wait_for_long(worker: Worker) -> Any:
    """Rank 1 receives, and rank 2 waits in an all-reduce, over many looks; the group still works afterwards."""
    waiting.SLICE = timedelta(milliseconds=1)
    waiting._LOOK_UP_S = 0.001
    worker.registry.install()
    dist.init_process_group("gloo", store=worker.store, rank=worker.rank, world_size=worker.size)
    worker.say("ready")
    if worker.rank == 0:
        for number in range(MESSAGES):
            worker.say(str(number))
            worker.hear()
        dist.send(torch.tensor([5.0]), 1)
    received = torch.zeros(1)
    if worker.rank == 1:
        dist.recv(received, 0)
    dist.all_reduce(total := torch.ones(1))
    return received.item(), total.item()


def test_a_receive_may_wait_longer_than_a_look() -> None:
    with Job(wait_for_long) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        for number in range(MESSAGES):
            assert job.heard(0) == str(number)
            job.tell("on", 0)
        assert job.results() == [(0.0, 3.0), (5.0, 3.0), (0.0, 3.0)]


def wait_longer_than_connections_take(worker: Worker) -> Any:
    """The time limit of gloo itself is the one for connections: a receive has the group's."""
    native._FULL_MESH = timedelta(seconds=2)
    worker.registry.install()
    dist.init_process_group("gloo", store=worker.store, rank=worker.rank, world_size=worker.size)
    received = torch.zeros(1)
    if worker.rank == 0:
        dist.recv(received, 1)
    if worker.rank == 1:
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            os.sched_yield()
        dist.send(torch.ones(1), 0)
    return received.item()


def test_a_receive_may_wait_longer_than_a_connection() -> None:
    with Job(wait_longer_than_connections_take, 2) as job:
        assert job.results() == [1.0, 0.0]


def lose_while_receiving(worker: Worker) -> Any:
    """Rank 0 waits for rank 1, which lives and sends nothing, when rank 2 is lost: the receive is filled."""
    listener = begin(worker)
    if worker.rank == 0:
        received = torch.full((2,), 7.0)
        work = dist.irecv(received, 1)
        anyone = dist.irecv(torch.ones(1))
        worker.say("ready")
        work.wait()
        anyone.wait()
        assert listener.frozen.wait(LIMIT)
        return received.tolist()
    worker.say("ready")
    listener.wait()
    return None


def test_a_receive_ends_when_its_group_becomes_void_though_its_sender_lives() -> None:
    with Job(lose_while_receiving) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        assert job.result(0) == [0.0, 0.0]


def send_what_nobody_takes(worker: Worker) -> Any:
    """A send of more than the sockets hold, to a rank that does not receive: its data stands in gloo's queue."""
    listener = begin(worker)
    if worker.rank == 0:
        work = dist.isend(torch.ones(8_000_000), 1)
        big = dist.all_reduce(torch.ones(8_000_000), async_op=True)
        worker.say("ready")
        work.wait()
        big.wait()
        assert listener.frozen.wait(LIMIT)
        return "ended"
    worker.say("ready")
    listener.wait()
    return None


def test_a_send_that_nobody_takes_ends_when_its_group_becomes_void_and_so_does_the_process() -> None:
    with Job(send_what_nobody_takes) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        assert job.result(0) == "ended"
        assert job.processes[0].exitcode == 0
