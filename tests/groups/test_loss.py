"""A lost rank: waiting collectives end at once, outputs are filled, and groups are built again."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import RankLostError
from checkpointless_elastic.groups import Situation, Superseded
from tests.groups.listener import begin, lose
from tests.groups.processes import LIMIT, Job, Worker


def wait_in_all_reduce(worker: Worker) -> Any:
    """Ranks 0 and 1 wait for rank 2, which waits for the test."""
    listener = begin(worker)
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
        return None
    tensor = torch.tensor([worker.rank + 1.5])
    work = dist.all_reduce(tensor, async_op=True)
    worker.say("issued")
    work.wait()
    ended = time.monotonic()
    assert listener.frozen.wait(LIMIT)
    return ended - listener.aborted_at, tensor.item(), listener.affected


def test_an_abort_wakes_a_waiting_all_reduce_though_every_peer_lives() -> None:
    with Job(wait_in_all_reduce) as job:
        for rank in (0, 1):
            assert [job.heard(rank), job.heard(rank)] == ["ready", "issued"]
        assert job.heard(2) == "ready"
        job.tell(("lost", {2}), 0, 1)
        for rank in (0, 1):
            seconds, value, affected = job.result(rank)
            assert seconds < 0.5
            assert value in (rank + 1.5, 4.0), "its own value, or a sum with the other survivor's"
            assert affected == ["0"]


def test_a_killed_peer_ends_a_waiting_all_reduce_and_its_output_is_valid() -> None:
    with Job(wait_in_all_reduce) as job:
        for rank in (0, 1):
            assert [job.heard(rank), job.heard(rank)] == ["ready", "issued"]
        assert job.heard(2) == "ready"
        lose(job, 2)
        for rank in (0, 1):
            seconds, value, _ = job.result(rank)
            assert seconds < 0.5
            assert value in (rank + 1.5, 4.0), "its own value, or a sum with the other survivor's"


def fill_everything(worker: Worker) -> Any:
    listener = begin(worker)
    pair = dist.new_group([0, 1])
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    listener.frozen.wait(LIMIT)
    dist.all_reduce(whole := torch.ones(1), group=pair)
    found = [whole.item()]
    for situation in (Situation.ATTEMPT, Situation.COMMITTED):
        worker.host.where = situation
        found.append([_listed(tensor) for tensor in _void_outputs(worker.rank, worker.size)])
    return found, worker.host.nan_outputs


def _void_outputs(rank: int, size: int) -> list[Any]:
    own = torch.tensor([1.0, 2.0]) + rank
    reduced, sent, integers = own.clone(), own.clone(), torch.tensor([5, 6])
    dist.all_reduce(reduced)
    dist.broadcast(sent, 2)
    dist.all_reduce(integers)
    gathered, single = [torch.empty(2) for _ in range(size)], torch.empty(2 * size)
    dist.all_gather(gathered, own)
    dist.all_gather_into_tensor(single, own)
    part, scattered, received = torch.empty(1), torch.empty(2), torch.empty(2)
    dist.reduce_scatter_tensor(part, torch.arange(3.0))
    dist.scatter(scattered, None, src=2)
    dist.recv(received, 2)
    dist.send(own, 2)
    exchanged, uneven = torch.empty(3), torch.empty(4)
    dist.all_to_all_single(exchanged, torch.arange(3.0))
    dist.all_to_all_single(uneven, torch.arange(3.0), [2, 1, 1], [1, 1, 1])
    dist.barrier()
    dist.monitored_barrier()
    future = dist.all_reduce(late := own.clone(), async_op=True).get_future()
    return [
        reduced,
        sent,
        integers,
        *gathered,
        single,
        part,
        scattered,
        received,
        exchanged,
        uneven,
        late,
        *future.wait(),
    ]


def _listed(tensor: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in tensor.tolist()]


def test_void_collectives_fill_their_outputs_with_valid_values_and_with_nan_after_the_gate() -> None:
    with Job(fill_everything) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        for rank in (0, 1):
            (whole, attempt, committed), nan_outputs = job.result(rank)
            assert whole == 2.0, "a group without a lost rank goes on working"
            own = [1.0 + rank, 2.0 + rank]
            zeros = [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0, 2.0], [0.0] * 4]
            assert attempt == [own, own, [5, 6], *[own] * 3, own * 3, [float(rank)], *zeros, own, own]
            none = [None, None]
            assert committed[:3] == [none, none, [0, 0]]
            assert all(value is None for output in committed[3:] for value in output)
            assert nan_outputs == 13


def notice_before_the_freeze(worker: Worker) -> Any:
    listener = begin(worker)
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return tensor.item(), listener.frozen.wait(LIMIT)


def test_a_collective_that_fails_before_the_freeze_waits_for_it_and_is_filled() -> None:
    with Job(notice_before_the_freeze) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        job.kill(2)
        job.tell(("lost", {2}), 0, 1)
        assert job.results(0, 1) == [(1.0, True)] * 2


def fail_without_a_loss(worker: Worker) -> Any:
    listener = begin(worker)
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="(?i)connection|reset|closed") as caught:
        dist.all_reduce(torch.ones(1))
    assert not isinstance(caught.value, RankLostError)
    return time.monotonic() - started


def test_a_broken_connection_without_a_loss_gives_the_native_error() -> None:
    with Job(fail_without_a_loss) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        job.kill(2)
        assert all(seconds < 20 for seconds in job.results(0, 1))


def lose_before_the_first_step(worker: Worker) -> Any:
    listener = begin(worker)
    worker.host.where = Situation.STARTUP
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    texts = []
    for _ in range(2):
        with pytest.raises(RankLostError) as caught:
            dist.all_reduce(torch.ones(1))
        texts.append(str(caught.value))
    with pytest.raises(RankLostError):
        dist.new_group()
    return texts


def test_before_the_first_step_a_lost_rank_is_an_error_that_names_op_and_group() -> None:
    with Job(lose_before_the_first_step) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        for texts in job.results(0, 1):
            assert all("all_reduce on group 0" in text and "generation 0" in text for text in texts)


def survive(worker: Worker) -> Any:
    listener = begin(worker)
    pair = dist.new_group([0, 1])
    other = dist.new_group([1, 2])
    if worker.rank > 0:
        dist.barrier(other)
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    dist.all_reduce(torch.ones(1))
    report = listener.rebuild()
    return report.rebuilt, report.kept, _sums(worker.rank, pair)


def replace(worker: Worker) -> Any:
    listener = begin(worker)
    pair = dist.new_group([0, 1])
    dist.new_group([1, 2])
    dist.all_reduce(alone := torch.tensor([4.0]))
    dist.barrier()
    assert alone.item() == 4.0
    report = listener.rebuild()
    return report.rebuilt, report.kept, _sums(worker.rank, pair)


def _sums(rank: int, pair: Any) -> list[float]:
    found = []
    for group in [None, pair] if rank < 2 else [None]:
        dist.all_reduce(tensor := torch.tensor([rank + 1.0]), group=group)
        found.append(tensor.item())
    return found


def test_a_replacement_takes_the_killed_ranks_place_and_the_groups_work_again() -> None:
    with Job(survive) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, replace, shadow=True)
        job.tell(("rebuild", 1))
        first, second, third = job.results()
        assert first == (("0",), ("1",), [6.0, 3.0])
        assert second == (("0", "2"), ("1",), [6.0, 3.0])
        assert third == (("0", "2"), (), [6.0])


def superseded(worker: Worker) -> Any:
    listener = begin(worker)
    worker.say("ready")
    if worker.rank != 0:
        listener.wait()
    listener.frozen.wait(LIMIT)
    dist.all_reduce(torch.ones(1))  # void, but a use: the group is connected at once
    aborts = worker.registry.aborts

    def lose_another() -> None:
        while not worker.registry._running:
            os.sched_yield()
        worker.registry.abort(frozenset({1, 2}))

    threading.Thread(target=lose_another).start()
    seconds = []
    for number in (1, 2):
        worker.registry.report_use(worker.store, number)
        started = time.monotonic()
        with pytest.raises(Superseded):
            worker.registry.rebuild(worker.store, number, aborts=aborts if number == 2 else None)
        seconds.append(time.monotonic() - started)
    return seconds


def test_a_further_loss_during_a_rebuild_ends_it_at_once() -> None:
    with Job(superseded) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        assert all(seconds < 0.5 for seconds in job.result(0))


def rebuild_many_times(worker: Worker) -> Any:
    listener = begin(worker)
    counts = []
    for generation in range(1, 24):
        worker.meet(f"before {generation}")
        worker.registry.abort(frozenset({2}))
        works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(3)]
        worker.registry.report_use(worker.store, generation)
        worker.registry.rebuild(worker.store, generation)
        dist.all_reduce(tensor := torch.ones(1))
        assert tensor.item() == 3.0
        for work in works:
            work.wait()
        del works
        counts.append(_settled_counts(worker))
    assert listener.frozen.is_set() is False
    return counts


def _settled_counts(worker: Worker) -> tuple[int, int]:
    """Descriptors and threads once the retired groups are gone, which takes a moment on their own thread."""
    deadline = time.monotonic() + LIMIT
    while any(thread.name == "checkpointless-retire" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        os.sched_yield()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_twenty_rebuilds_leave_no_descriptor_and_no_thread_behind() -> None:
    with Job(rebuild_many_times) as job:
        for counts in job.results():
            early, late = counts[2], counts[-1]
            assert late[0] <= early[0] + 2, f"descriptors grow: {counts}"
            assert late[1] <= early[1] + 1, f"threads grow: {counts}"


def fail_in_backward(worker: Worker) -> Any:
    """The loss hits DDP's all-reduces in flight; the process must end, and not be stuck in a destructor."""
    listener = begin(worker)
    torch.manual_seed(1)
    net = DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)]), bucket_cap_mb=0.01
    )
    for _ in range(2):
        net(torch.ones(2, 64)).sum().backward()
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    loss = net(torch.ones(2, 64)).sum()
    try:
        loss.backward()
    except RuntimeError:
        pass
    listener.frozen.wait(LIMIT)
    del net, loss
    return "ended"


def test_a_backward_that_loses_a_peer_does_not_leave_the_process_stuck() -> None:
    for _ in range(3):
        with Job(fail_in_backward) as job:
            assert {job.heard(rank) for rank in range(3)} == {"ready"}
            lose(job, 2)
            assert job.results(0, 1) == ["ended"] * 2
