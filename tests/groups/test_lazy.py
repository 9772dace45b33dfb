"""After a loss a group is connected again at once if it was used lately, else when a member uses it again."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpointless_elastic.groups import LoggedCollective, RebuildReport, Situation, connecting
from tests.groups.listener import Listener, begin, lose
from tests.groups.processes import LIMIT, Job, Worker

CALLS = 7
"""Committed calls at the time of the loss: what a group carried before them does not count any more."""


def count_connections() -> Counter[str]:
    """How often each group is connected from now on, by name; every connection is still made."""
    counts: Counter[str] = Counter()
    original = connecting.connect

    def counted(spec: Any, *arguments: Any) -> Any:
        counts[spec.name] += 1
        return original(spec, *arguments)

    connecting.connect = counted
    return counts


def total(rank: int, group: Any = None) -> float:
    """The sum of rank + 1 over the group."""
    dist.all_reduce(tensor := torch.tensor([rank + 1.0]), group=group)
    return tensor.item()


def meet_a_loss(worker: Worker, listener: Listener, generation: int = 1) -> RebuildReport:
    """Stands where rank 2 dies, and takes part in the rebuild; a replacement comes to the rebuild only."""
    if not worker.registry.shadow:
        worker.say("ready")
        if worker.rank == 2:
            listener.wait()
        assert listener.frozen.wait(LIMIT)
    report = listener.rebuild()
    worker.meet(f"rebuilt {generation}")  # the job goes on when all have rebuilt
    return report


def lose_and_replace(job: Job, body: Any, ranks: int = 3) -> None:
    """Rank 2 dies and is replaced, once all are where they wait for that."""
    assert {job.heard(rank) for rank in range(ranks)} == {"ready"}
    lose(job, 2)
    job.start(2, body, shadow=True)
    job.tell(("rebuild", 1))


def used_and_unused(worker: Worker) -> Any:
    """Four ranks: everybody, two halves of which each is used all the time, and a pair that nobody uses."""
    counts = count_connections()
    listener = begin(worker)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own, pair = halves[worker.rank // 2], dist.new_group([1, 3])
    names = {"world": "0", "half": own.group_name}
    if worker.rank in (1, 3):
        names["pair"] = pair.group_name
    total(worker.rank)
    worker.registry.committed(CALLS)
    total(worker.rank, own)
    before = own.link.native
    report = meet_a_loss(worker, listener)
    parts = {
        "rebuilt": report.rebuilt,
        "kept": report.kept,
        "lazy": report.lazy,
        "half": (total(worker.rank, own), own.link.native is before, counts[names["half"]]),
        "world unused": counts["0"],
    }
    worker.meet("world is not used yet")
    parts["world"] = (total(worker.rank), total(worker.rank), counts["0"])
    return names, parts


def test_only_affected_groups_in_use_are_connected_and_others_at_their_next_use_or_never() -> None:
    with Job(used_and_unused, 4) as job:
        lose_and_replace(job, used_and_unused, 4)
        for rank, (names, parts) in enumerate(job.results()):
            affected, paired = rank >= 2, rank in (1, 3)
            half, world = (names["half"],), ("0",)
            pair = (names["pair"],) if paired else ()
            assert parts["rebuilt"] == (half if affected else ())
            assert parts["kept"] == (() if affected else half) + pair
            assert parts["lazy"] == world
            connected = {0: 1, 1: 1, 2: 1, 3: 2}[rank]  # rank 2 is the replacement
            assert parts["half"] == (3.0 if rank < 2 else 7.0, not affected, connected)
            assert parts["world unused"] == (0 if rank == 2 else 1), "nobody used it, nobody connected it"
            assert parts["world"] == (10.0, 10.0, 1 if rank == 2 else 2)


def left_lazy(worker: Worker) -> Listener:
    """Rank 2 was lost and replaced, and the default group and one like it were left lazy."""
    listener = begin(worker)
    dist.new_group([0, 1, 2], group_desc="other")
    worker.registry.committed(CALLS)
    report = meet_a_loss(worker, listener)
    assert (report.rebuilt, len(report.lazy)) == ((), 2)
    assert worker.registry.has_live_groups()
    return listener


def other_group() -> Any:
    """The second group of `left_lazy`."""
    return next(group for group in dist.distributed_c10d._world.pg_map if group.group_desc == "other")


def send_while_the_third_waits(worker: Worker) -> Any:
    listener = left_lazy(worker)
    tensor = torch.zeros(1)
    if worker.rank == 0:
        dist.send(torch.tensor([5.0]), 1)
    if worker.rank == 1:
        dist.recv(tensor, 0)
    if worker.rank == 2:
        listener.wait()
    worker.say(tensor.item())
    return total(worker.rank)


def test_a_send_on_a_lazy_group_does_not_wait_for_a_member_that_does_not_take_part() -> None:
    with Job(send_while_the_third_waits) as job:
        lose_and_replace(job, send_while_the_third_waits)
        assert [job.heard(0), job.heard(1)] == [0.0, 5.0]
        job.tell(("go",), 2)
        assert job.results(0, 1) == [6.0, 6.0]


def use_in_another_order(worker: Worker) -> Any:
    left_lazy(worker)
    groups = [dist.group.WORLD, other_group()]
    tensors = [torch.tensor([worker.rank + 1.0]), torch.tensor([worker.rank + 10.0])]
    order = (0, 1) if worker.rank else (1, 0)
    works = [dist.all_reduce(tensors[which], group=groups[which], async_op=True) for which in order]
    for work in works:
        work.wait()
    return [tensor.item() for tensor in tensors]


def test_two_lazy_groups_may_be_used_in_another_order_on_each_rank() -> None:
    with Job(use_in_another_order) as job:
        lose_and_replace(job, use_in_another_order)
        assert job.results() == [[6.0, 33.0]] * 3


def ask_for_the_native_group(worker: Worker) -> Any:
    left_lazy(worker)
    group = dist.group.WORLD
    number = group._get_sequence_number_for_group()
    return number, group.link.lazy is None, total(worker.rank)


def test_who_asks_for_the_native_group_gets_one() -> None:
    with Job(ask_for_the_native_group) as job:
        lose_and_replace(job, ask_for_the_native_group)
        assert job.results() == [(0, True, 6.0)] * 3


def lose_while_it_is_connected(worker: Worker) -> Any:
    """Rank 2 dies as it is about to connect the group that rank 0 wants, so the others wait for it."""
    listener = left_lazy(worker)
    if worker.rank == 2:
        connecting.connect = die
    worker.meet("lazy")
    if worker.rank == 2:
        listener.wait()
    dist.all_reduce(tensor := torch.tensor([worker.rank + 1.5]))
    frozen = listener.frozen.is_set()
    report = listener.rebuild()
    worker.meet("rebuilt 2")
    return (
        tensor.item(),
        frozen,
        report.rebuilt,
        report.lazy,
        total(worker.rank),
        total(worker.rank, other_group()),
    )


def die(*arguments: Any) -> Any:
    """Stands in place of `connect`."""
    os.kill(os.getpid(), signal.SIGKILL)


def join_again(worker: Worker) -> Any:
    listener = begin(worker)
    dist.new_group([0, 1, 2], group_desc="other")
    report = listener.rebuild()
    worker.meet("rebuilt 2")
    return report.rebuilt, report.lazy, total(worker.rank), total(worker.rank, other_group())


def test_a_member_lost_while_a_lazy_group_is_connected_makes_it_void_and_the_next_rebuild_connects_it() -> (
    None
):
    with Job(lose_while_it_is_connected) as job:
        lose_and_replace(job, lose_while_it_is_connected)
        job.processes[2].join(LIMIT)
        assert job.processes[2].exitcode == -signal.SIGKILL
        job.tell(("lost", {2}), 0, 1)
        job.start(2, join_again, shadow=True)
        job.tell(("rebuild", 2))
        first, second, third = job.results()
    assert first == (1.5, True, ("0",), ("1",), 6.0, 6.0)
    assert second == (2.5, True, ("0",), ("1",), 6.0, 6.0)
    assert third == (("0",), ("1",), 6.0, 6.0)


def lose_another_rank(worker: Worker) -> Any:
    """A lazy group that a second loss does not affect stays lazy, under the prefix of the rebuild that left it so."""
    counts = count_connections()
    listener = begin(worker)
    threes = dist.new_group([0, 1, 2])
    worker.registry.committed(CALLS)
    if not worker.registry.shadow or worker.rank == 2:
        first = meet_a_loss(worker, listener)
        assert len(first.lazy) == (1 if worker.rank == 3 else 2)
        listener.frozen.clear()
        worker.say("lazy")
        if worker.rank == 3:
            listener.wait()
        assert listener.frozen.wait(LIMIT)
    report = listener.rebuild()
    worker.meet("rebuilt 2")
    sums = (total(worker.rank, threes), counts[threes.group_name]) if worker.rank < 3 else None
    return report.lazy, report.kept, sums, worker.rank < 3 and threes.link.generation


def test_a_lazy_group_that_another_loss_does_not_affect_stays_lazy_and_is_connected_at_its_use() -> None:
    with Job(lose_another_rank, 4) as job:
        lose_and_replace(job, lose_another_rank, 4)
        assert [job.heard(rank) for rank in range(4)] == ["lazy"] * 4
        lose(job, 3)
        job.start(3, lose_another_rank, shadow=True)
        job.tell(("rebuild", 2))
        found = job.results()
    assert found[0] == found[1] == (("0", "1"), (), (6.0, 2), 1)
    assert found[2] == (("0", "1"), (), (6.0, 1), 1)
    assert found[3] == (("0",), (), None, False)


def use_on_one_rank_only(worker: Worker) -> Any:
    """Only rank 0 knows of a use: it had issued a collective when it heard of the loss, the others had not."""
    listener = begin(worker)
    worker.registry.committed(CALLS)
    if not worker.registry.shadow:
        worker.say("ready")
        if worker.rank == 2:
            listener.wait()
        assert listener.frozen.wait(LIMIT)
        if worker.rank == 0:
            dist.all_reduce(torch.ones(1))
    report = listener.rebuild()
    return report.rebuilt, report.lazy, total(worker.rank)


def test_one_member_that_uses_a_group_has_it_connected_by_all() -> None:
    with Job(use_on_one_rank_only) as job:
        lose_and_replace(job, use_on_one_rank_only)
        assert job.results() == [(("0",), (), 6.0)] * 3


def sent_by_the_lost_rank(worker: Worker) -> Any:
    """Rank 2 had broadcast before it was lost, as its log says; the others come to that broadcast after the rebuild."""
    sent = torch.tensor([3.5])
    worker.host.old_log = [LoggedCollective("0", "broadcast", (sent.numpy().tobytes(),))]
    listener = begin(worker)
    worker.registry.committed(CALLS)
    if worker.registry.shadow:
        worker.host.where = Situation.OUTSIDE
        dist.broadcast(sent, 2)
        worker.host.where = Situation.ATTEMPT
        report = listener.rebuild()
        worker.meet("rebuilt 1")
    else:
        report = meet_a_loss(worker, listener)
        dist.broadcast(sent := torch.zeros(1), 2)
    return report.rebuilt, sent.item(), total(worker.rank)


def test_a_group_whose_use_only_the_lost_rank_knew_of_is_connected_and_what_it_sent_is_sent_again() -> None:
    with Job(sent_by_the_lost_rank) as job:
        lose_and_replace(job, sent_by_the_lost_rank)
        assert job.results() == [(("0",), 3.5, 6.0)] * 3


@pytest.mark.parametrize(("calls", "eager"), [(0, True), (1, True), (2, False)])
def test_a_use_counts_until_the_second_committed_call_after_it(calls: int, eager: bool) -> None:
    with Job(use_and_commit) as job:
        job.tell(("calls", calls))
        lose_and_replace(job, use_and_commit)
        for rank in range(3):
            report, value = job.result(rank)
            assert report == ((("0",), ()) if eager else ((), ("0",)))
            assert value == 6.0


def use_and_commit(worker: Worker) -> Any:
    calls = 0 if worker.registry.shadow else worker.hear()[1]
    listener = begin(worker)
    worker.registry.committed(CALLS)
    if not worker.registry.shadow:
        total(worker.rank)
    for number in range(calls):
        worker.registry.committed(CALLS + 1 + number)
    report = meet_a_loss(worker, listener)
    return (report.rebuilt, report.lazy), total(worker.rank)
