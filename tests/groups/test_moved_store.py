"""The store in which workers meet is lost and they go on in another one; groups beside those of scripts."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from checkpointless_elastic.groups import Superseded
from checkpointless_elastic.groups.spec import GroupSpec
from tests.groups.listener import Listener, begin, lose
from tests.groups.processes import LIMIT, Job, Worker
from tests.groups.test_lazy import CALLS, total

SPEC = ("aside", "a test", (0, 1, 2))


def open_store(worker: Worker, name: str) -> tuple[TCPStore | None, TCPStore]:
    """A server of this name on rank 0, and a client of it."""
    server = None
    if worker.rank == 0:
        server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        worker.store.set(name, str(server.port))
    port = int(worker.store.get(name))
    return server, TCPStore("localhost", port, timeout=timedelta(seconds=LIMIT))


def recover(worker: Worker, listener: Listener, store: TCPStore, generation: int, moved: bool) -> Any:
    """As a session does it."""
    registry = worker.registry
    registry.supersede(generation)
    registry.report_use(store, generation, moved=moved)
    worker.meet(f"reported use {generation}")
    report = registry.rebuild(store, generation, moved=moved)
    listener.frozen.clear()
    worker.meet(f"rebuilt {generation}")
    return report


def move(worker: Worker) -> Any:
    """Rank 2 is replaced, and two groups are left lazy; then the store is lost, as a thread wants one of them."""
    listener = begin(worker)
    other = dist.new_group([0, 1, 2], group_desc="other")
    worker.registry.committed(CALLS)
    if not worker.registry.shadow:
        worker.say("ready")
        if worker.rank == 2:
            listener.wait()
        assert listener.frozen.wait(LIMIT)
    servers = {}
    servers["old"], store = open_store(worker, "old")
    first = recover(worker, listener, store, 1, moved=False)
    servers["new"], client = open_store(worker, "new")
    del servers["old"]
    worker.meet("lost")
    found: list[float] = []
    user = threading.Thread(target=lambda: found.append(total(worker.rank)), daemon=True)
    user.start()
    second = recover(worker, listener, client, 2, moved=True)
    user.join(LIMIT)
    made = dist.new_group([0, 1, 2])  # by the script, which knows no other store than that of the start
    values = [total(worker.rank, group) for group in (other, dist.group.WORLD, made)]
    return first.lazy, second.lazy, len(found), values


def test_lazy_groups_work_in_the_new_store_and_so_do_groups_that_scripts_make_later() -> None:
    with Job(move) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, move, shadow=True)
        for first, second, count, values in job.results():
            assert first == ("0", "1")
            assert "1" in second
            assert (count, values) == (1, [6.0, 6.0, 6.0])


def half_connected(worker: Worker) -> Any:
    """A group that only rank 1 holds void is void on all members where the store has moved."""
    listener = begin(worker)
    worker.registry.committed(CALLS)
    worker.meet("begun")
    before = dist.group.WORLD.link.native
    if worker.rank == 1:
        worker.registry.abort(frozenset({0, 1, 2}))
    _, store = open_store(worker, "new")
    report = recover(worker, listener, store, 1, moved=True)
    return report.lazy, report.kept, dist.group.WORLD.link.native is before, total(worker.rank)


def test_what_is_void_on_one_member_is_void_on_all_where_the_store_has_moved() -> None:
    with Job(half_connected) as job:
        assert job.results() == [(("0",), (), False, 6.0)] * 3


def beside(worker: Worker) -> Any:
    """A group for a transfer; then one whose last member does not come, and one whose peers are silent."""
    listener = begin(worker)
    spec = GroupSpec(*SPEC, worker.rank, "gloo", (("cpu", "gloo"),), timedelta(seconds=LIMIT))
    link = worker.registry.connect_beside(spec, worker.store, 1)
    number = torch.tensor([float(worker.rank)])
    if worker.rank == 0:
        link.wait(link.native.send([number], 1, 0))
    if worker.rank == 1:
        link.wait(link.native.recv([number], 0, 0))
        seconds = cut_off(worker, lambda: link.wait(link.native.recv([number], 0, 0)), 2)
    worker.registry.let_go(link)
    if worker.rank != 1:
        return number.item(), worker.registry.signature() == begin_only(listener)
    seconds += cut_off(worker, lambda: worker.registry.connect_beside(spec, worker.store, 2), 3)
    with pytest.raises(Superseded):
        worker.registry.connect_beside(spec, worker.store, 2)
    return number.item(), seconds < 2.0


def begin_only(listener: Listener) -> Any:
    """The groups that a script knows of."""
    return [dist.group.WORLD.spec.signature] if listener else []


def cut_off(worker: Worker, wait: Any, generation: int) -> float:
    """How long a newer generation needs to end a wait."""
    done: list[float] = []

    def ended() -> None:
        try:
            wait()
        except (RuntimeError, Superseded):
            done.append(time.monotonic())

    waiter = threading.Thread(target=ended, daemon=True)
    waiter.start()
    while not worker.registry._apart and not worker.registry._beside:
        continue
    started = time.monotonic()
    worker.registry.supersede(generation)
    waiter.join(LIMIT)
    return done[0] - started


def test_a_group_beside_those_of_the_script_ends_with_its_generation() -> None:
    with Job(beside) as job:
        assert job.results() == [(0.0, True), (0.0, True), (2.0, True)]
