"""Collectives outside of steps: logged for a replacement, repeated after a loss, repeated for members left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpointless_elastic.errors import RankLostError, ScriptMismatchError
from checkpointless_elastic.groups import LoggedCollective, Registry, Situation
from tests.groups.listener import begin, lose
from tests.groups.processes import LIMIT, Job, MemoryHost, Worker

COMMITTED_CALLS = 5


def start_up(rank: int, size: int) -> list[Any]:
    """What a script says before its first step."""
    pair = dist.new_group([0, 2])
    run = [f"run {rank}"]
    dist.broadcast_object_list(run, 0)
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, f"host {rank}")
    first = dist.all_reduce(one := torch.tensor([rank + 0.5]), async_op=True)
    second = dist.all_reduce(two := torch.tensor([rank, 2], dtype=torch.bfloat16), async_op=True)
    second.wait()
    first.wait()
    future = dist.all_reduce(three := torch.tensor(rank + 1), async_op=True).get_future()
    future.wait()
    out = torch.zeros(1)
    dist.scatter(out, [torch.tensor([float(index)]) for index in range(size)] if rank == 1 else None, src=1)
    if rank != 1:
        dist.all_reduce(out, group=pair)
    if rank == 0:
        dist.send(torch.tensor([7.0]), 1)
    if rank == 1:
        dist.recv(out, 0)
    dist.all_reduce(big := torch.full((300_000,), float(rank)))
    dist.barrier()
    return [run, hosts, one.tolist(), two.tolist(), three.tolist(), out.tolist(), big[0].item()]


def live_start_up(worker: Worker) -> Any:
    begin(worker)
    worker.host.where = Situation.STARTUP
    return start_up(worker.rank, worker.size), worker.host.log


def start_up_in_shadow(worker: Worker) -> Any:
    worker.host.old_log = worker.hear()
    begin(worker)
    worker.host.where = Situation.STARTUP
    return start_up(worker.rank, worker.size), worker.host.old_log, worker.host.log


def test_a_replacement_is_answered_as_the_lost_rank_was_and_contacts_nobody() -> None:
    with Job(live_start_up) as job:
        live = job.results()
    with Job(live_start_up, 0) as job:
        job.size = 3
        for rank in range(3):
            job.start(rank, start_up_in_shadow, shadow=True)
            job.tell(live[rank][1], rank)
            answers, left, log = job.result(rank)
            assert answers[:-1] == live[rank][0][:-1]
            assert answers[-1] == float(rank), "outputs over 1 MiB are answered locally"
            assert (left, log) == ([], [])


def part_from_the_log(worker: Worker) -> Any:
    begin(worker)
    worker.host.where = Situation.STARTUP
    two = (torch.zeros(2).numpy().tobytes(),)
    texts = []
    for entry in (LoggedCollective("0", "broadcast", two), LoggedCollective("0", "all_reduce", two)):
        worker.host.old_log = [entry]
        with pytest.raises(ScriptMismatchError) as caught:
            dist.all_reduce(torch.zeros(3))
        texts.append(str(caught.value))
    return texts


def test_a_replacement_whose_collectives_differ_is_told_where_they_part() -> None:
    with Job(part_from_the_log, 0) as job:
        job.size = 2
        job.start(0, part_from_the_log, shadow=True)
        op, size = job.result(0)
    assert "all_reduce here, broadcast there" in op
    assert "collective 1 of group 0" in op
    assert "outputs of [12] bytes here, [8] there" in size


def outside(worker: Worker) -> Any:
    """Three collectives outside of steps; rank 2 is killed before it issues the second."""
    listener = begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    dist.all_reduce(first := torch.tensor([worker.rank + 1.0]))
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    return _rest(worker, first)


def outside_in_shadow(worker: Worker) -> Any:
    """The log has the first collective; at the second the replacement joins."""
    worker.host.old_log = [LoggedCollective("0", "all_reduce", (torch.tensor([6.0]).numpy().tobytes(),))]
    begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    dist.all_reduce(first := torch.tensor([worker.rank + 1.0]))
    return _rest(worker, first)


def _rest(worker: Worker, first: torch.Tensor) -> Any:
    dist.all_reduce(second := torch.tensor([worker.rank + 10.0]))
    gathered = [torch.zeros(1) for _ in range(worker.size)]
    dist.all_gather(gathered, torch.tensor([float(worker.rank)]))
    dist.barrier()
    return [first.item(), second.item(), *[one.item() for one in gathered]], worker.host.recoveries


def test_outside_of_steps_a_collective_is_repeated_with_its_own_inputs_after_the_recovery() -> None:
    with Job(outside) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, outside_in_shadow, shadow=True)
        job.tell(("rebuild", 1))
        assert job.results() == [([6.0, 33.0, 0.0, 1.0, 2.0], 1)] * 3


def run_ahead(worker: Worker) -> Any:
    """Rank 2 broadcasts; rank 0 has the value and is in a step when rank 2 dies, rank 1 has not asked for it yet."""
    listener = begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    dist.barrier()
    if worker.rank == 1:
        assert listener.frozen.wait(LIMIT)
    return _broadcast_and_a_step(worker, listener)


def run_after(worker: Worker) -> Any:
    """The replacement of rank 2: the lost one had finished the barrier and not its broadcast."""
    worker.host.old_log = [LoggedCollective("0", "barrier", ())]
    listener = begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    dist.barrier()
    return _broadcast_and_a_step(worker, listener)


def _broadcast_and_a_step(worker: Worker, listener: Any) -> Any:
    tensor = torch.tensor([3.5, 4.5]) if worker.rank == 2 else torch.zeros(2)
    dist.broadcast(tensor, 2)
    value = tensor.tolist()
    tensor.zero_()
    worker.host.where = Situation.ATTEMPT
    if worker.host.recoveries == 0:
        worker.say("ahead")
        dist.all_reduce(torch.ones(1))
        listener.rebuild()
    owed = [one.method for one in worker.registry.engine.ledger.owed]
    dist.all_reduce(total := torch.ones(1))
    return value, total.item(), owed


def test_a_member_that_ran_ahead_repeats_what_those_behind_still_need() -> None:
    with Job(run_ahead) as job:
        assert job.heard(0) == "ahead"
        lose(job, 2)
        job.start(2, run_after, shadow=True)
        job.tell(("rebuild", 1))
        found = job.results()
    assert found[0] == ([3.5, 4.5], 3.0, ["broadcast"])
    assert found[1] == found[2] == ([3.5, 4.5], 3.0, [])


def asynchronous(worker: Worker) -> Any:
    """Two all-reduces in flight when rank 2 dies, awaited in another order than issued."""
    listener = begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    tensors = [torch.tensor([worker.rank + 1.0 + place]) for place in range(2)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works[::-1] if worker.rank == 0 else works:
        work.wait()
    return [tensor.item() for tensor in tensors]


def asynchronous_in_shadow(worker: Worker) -> Any:
    begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    tensors = [torch.tensor([worker.rank + 1.0 + place]) for place in range(2)]
    for tensor in tensors:
        dist.all_reduce(tensor)
    return [tensor.item() for tensor in tensors]


def test_asynchronous_collectives_are_repeated_in_the_order_in_which_they_were_issued() -> None:
    with Job(asynchronous) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, asynchronous_in_shadow, shadow=True)
        job.tell(("rebuild", 1))
        assert job.results() == [[6.0, 9.0]] * 3


def not_repeatable(worker: Worker) -> Any:
    listener = begin(worker)
    worker.host.where = Situation.OUTSIDE
    worker.registry.committed(COMMITTED_CALLS)
    if worker.rank == 2:
        worker.say("ready")
        listener.wait()
    texts = []
    received = dist.irecv(torch.zeros(1), 2)
    changed = torch.ones(1)
    work = dist.all_reduce(changed, async_op=True)
    changed.add_(1)
    worker.say("ready")
    with pytest.raises(RankLostError) as caught:
        received.wait()
    texts.append(str(caught.value))
    with pytest.raises(RankLostError) as caught:
        work.wait()
    texts.append(str(caught.value))
    worker.say("raised")
    listener.wait()
    return texts


def test_what_cannot_be_repeated_is_an_error_that_says_why() -> None:
    with Job(not_repeatable) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, asynchronous_in_shadow, shadow=True)
        job.tell(("rebuild", 1))
        assert [job.heard(rank) for rank in (0, 1)] == ["raised", "raised"]
        job.tell(("go",), 0, 1)
        for received, changed in job.results(0, 1):
            assert "recv on group 0" in received
            assert "cannot be repeated" in received
            assert "buffers have changed" in changed


def test_a_registry_without_groups_rebuilds_nothing_and_leaves_shadow() -> None:
    registry = Registry(MemoryHost(), shadow=True)
    report = registry.rebuild(dist.HashStore(), 4)
    assert (report.rebuilt, report.kept, report.lazy, registry.shadow) == ((), (), (), False)
