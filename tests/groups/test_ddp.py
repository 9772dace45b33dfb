"""DDP's bucket order reaches a replacement, and a reducer cut short works again, with the same bits."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from checkpointless_elastic.errors import RankLostError, StateMismatchError
from checkpointless_elastic.groups import Situation, backward, ddp, work
from tests.groups.listener import Listener, begin, lose
from tests.groups.processes import LIMIT, Job, Worker


class Crossed(nn.Module):
    """Layers are used in another order than they are defined in, so that a rebuild changes the buckets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(7))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for index in (3, 0, 6, 2, 5, 1, 4):
            value = torch.relu(self.layers[index](value)) + value
        return value


def wrapped(static: bool = False) -> DistributedDataParallel:
    return DistributedDataParallel(Crossed(), bucket_cap_mb=0.015, static_graph=static)


def step(net: DistributedDataParallel, rank: int, number: int) -> list[bytes]:
    """One forward and backward; the gradients."""
    net.zero_grad()
    torch.manual_seed(100 * number + rank)
    net(torch.randn(4, 40)).pow(2).sum().backward()
    return [parameter.grad.numpy().tobytes() for parameter in net.parameters() if parameter.grad is not None]


def buckets(net: DistributedDataParallel) -> list[list[int]]:
    """The parameters of each bucket, by their place in the model."""
    places = {parameter.data_ptr(): place for place, parameter in enumerate(net.parameters())}
    found = net.reducer._get_zeros_like_grad_buckets()
    return [[places[parameter.data_ptr()] for parameter in bucket.parameters()] for bucket in found]


def run_without_a_fault(worker: Worker, static: bool = False) -> Any:
    begin(worker)
    net = wrapped(static)
    grads = [step(net, worker.rank, number) for number in range(5)]
    dist.barrier()
    return grads, buckets(net)


def survive(worker: Worker, static: bool) -> Any:
    """Loses rank 2 in the middle of step 3, and does step 3 again with its replacement."""
    listener, net = begin(worker), wrapped(static)
    grads = [step(net, worker.rank, number) for number in range(3)]
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    try:
        step(net, worker.rank, 3)
    except RuntimeError:
        assert listener.frozen.wait(LIMIT)
    ddp.reset(net)
    order = ddp.bucket_order(net)
    if worker.rank == 0:
        worker.store.set("order", order or b"")
    return _rejoin(worker, listener, net, grads)


def replace(worker: Worker, static: bool) -> Any:
    listener, net = begin(worker), wrapped(static)
    assert ddp.bucket_order(net) is None
    ddp.adopt_bucket_order(net, worker.store.get("order"))
    return _rejoin(worker, listener, net, [])


def _rejoin(worker: Worker, listener: Listener, net: Any, grads: list[Any]) -> Any:
    listener.rebuild()
    grads += [step(net, worker.rank, number) for number in (3, 4)]
    dist.barrier()
    return grads, buckets(net)


@pytest.mark.parametrize("static", [False, True], ids=["", "static_graph"])
def test_a_replacement_adopts_the_bucket_order_and_gradients_are_those_of_a_run_without_a_fault(
    static: bool,
) -> None:
    with Job(partial(run_without_a_fault, static=static)) as job:
        whole = job.results()
    with Job(partial(survive, static=static)) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, partial(replace, static=static), shadow=True)
        job.tell(("rebuild", 1))
        found = job.results()
    assert whole[0][1] != sorted(whole[0][1], reverse=True), "this model's buckets are to be reordered"
    assert whole[0][1] == found[0][1] == found[1][1] == found[2][1]
    assert found[0] == whole[0]
    assert found[1] == whole[1]
    assert found[2][0] == whole[2][0][3:]


def lose_before_any_rebuild(worker: Worker) -> Any:
    """Loses rank 2 in the first step: nobody has an order, all reset, and the first step runs again."""
    listener, net = begin(worker), wrapped()
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    try:
        step(net, worker.rank, 0)
    except RuntimeError:
        assert listener.frozen.wait(LIMIT)
    assert ddp.bucket_order(net) is None
    ddp.reset(net)
    listener.rebuild()
    return [step(net, worker.rank, number) for number in range(5)], buckets(net)


def replace_in_the_first_step(worker: Worker) -> Any:
    listener, net = begin(worker), wrapped()
    listener.rebuild()
    return [step(net, worker.rank, number) for number in range(5)], buckets(net)


def test_a_loss_in_the_first_step_leaves_the_buckets_of_construction_and_the_same_gradients() -> None:
    with Job(run_without_a_fault) as job:
        whole = job.results()
    with Job(lose_before_any_rebuild) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, replace_in_the_first_step, shadow=True)
        job.tell(("rebuild", 1))
        assert job.results() == whole


def lose_in_the_rebuild(worker: Worker) -> Any:
    """Loses rank 2 between the first backward and the next forward: an order is forced and taken by all."""
    listener, net = begin(worker), wrapped()
    grads = [step(net, worker.rank, 0)]
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    assert listener.frozen.wait(LIMIT)
    try:
        step(net, worker.rank, 1)
        outcome = "no error"
    except RankLostError:
        outcome = "lost"
    if worker.rank == 0:
        order = ddp.force_bucket_order(net)
        assert order is not None
        assert order == ddp.force_bucket_order(net) == ddp.bucket_order(net)
        worker.store.set("order", order)
    ddp.adopt_bucket_order(net, worker.store.get("order"))
    listener.rebuild()
    grads += [step(net, worker.rank, number) for number in range(1, 5)]
    return grads, buckets(net), outcome


def replace_after_the_first_step(worker: Worker) -> Any:
    listener, net = begin(worker), wrapped()
    ddp.adopt_bucket_order(net, worker.store.get("order"))
    listener.rebuild()
    return [step(net, worker.rank, number) for number in range(1, 5)], buckets(net), "lost"


def test_a_loss_while_buckets_are_rebuilt_is_an_error_and_a_forced_order_serves_all() -> None:
    with Job(run_without_a_fault) as job:
        whole = job.results()
    with Job(lose_in_the_rebuild) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        job.start(2, replace_after_the_first_step, shadow=True)
        job.tell(("rebuild", 1))
        found = job.results()
    assert [outcome for _, _, outcome in found] == ["lost"] * 3
    assert [sizes for _, sizes, _ in found] == [sizes for _, sizes in whole]
    assert found[0][0] == whole[0][0]
    assert found[2][0] == whole[2][0][1:]


def count_abortable_futures(worker: Worker) -> list[int]:
    """How many a usual step makes, and one whose comm hook asks for a future itself."""
    begin(worker)
    made: list[Any] = []
    abortable = work.AbortableFuture
    work.AbortableFuture = lambda *given: made.append(given) or abortable(*given)  # type: ignore[assignment, misc, func-returns-value]
    counts = []
    for hooked in (False, True):
        net = wrapped()
        if hooked:
            net.register_comm_hook(None, fp16_compress_hook)
        step(net, worker.rank, 0)
        counts.append(len(made))
    dist.barrier()
    return counts


def test_only_the_reducer_gets_futures_that_the_end_of_its_backward_makes_true() -> None:
    with Job(count_abortable_futures) as job:
        for usual, hooked in job.results():
            assert usual == 0
            assert hooked > 0


def come_late_in_turn(worker: Worker) -> list[list[bytes]]:
    """Each rank is late for the reduction of one step: the buckets of the others are long waiting then."""
    begin(worker)
    net = wrapped()
    grads = []
    for number in range(2 * 3):
        late = net.register_forward_hook(lambda *_: time.sleep(0.2)) if number % 3 == worker.rank else None
        grads.append(step(net, worker.rank, number))
        if late is not None:
            late.remove()
    dist.barrier()
    return grads


def test_a_backward_ends_when_its_last_peer_has_come() -> None:
    with Job(come_late_in_turn) as job:
        first, *others = job.results()
    assert others == [first] * 2


def futures_of_buckets(worker: Worker) -> tuple[list[int], int]:
    """How many completed futures are kept after each step, and when the model is gone."""
    begin(worker)
    net = wrapped()
    counts = []
    for number in range(4):
        step(net, worker.rank, number)
        counts.append(len(backward.buckets))
    del net
    gc.collect()
    dist.barrier()
    return counts, len(backward.buckets)


def step_with_sparse_gradients(worker: Worker) -> tuple[int, list[bytes]]:
    """Their bucket is another tensor in each backward."""
    begin(worker)
    torch.manual_seed(worker.rank)
    net = DistributedDataParallel(nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 4)))
    for _ in range(4):
        net.zero_grad()
        net(torch.randint(0, 50, (8,))).sum().backward()
    dist.barrier()
    grads = [param.grad for param in net.parameters() if param.grad is not None]
    return len(backward.buckets), [grad.to_dense().numpy().tobytes() for grad in grads]


def test_sparse_gradients_are_reduced_and_nothing_of_them_is_kept() -> None:
    with Job(step_with_sparse_gradients) as job:
        found = job.results()
    assert found == [found[0]] * 3
    assert found[0][0] == 1, "the bucket of the linear layer"
    assert len(found[0][1]) == 3


def test_a_future_is_made_once_for_each_bucket_and_let_go_of_with_it() -> None:
    with Job(futures_of_buckets) as job:
        for counts, left in job.results():
            assert counts == [1, 3, 3, 3], "it has one bucket before it rebuilds them"
            assert left == 0


def void_forward_and_backward(worker: Worker) -> Any:
    """A group that is void from the start of a step: DDP's reducer takes filled works, and nothing is raised."""
    listener, net = begin(worker), wrapped()
    for number in range(2):
        step(net, worker.rank, number)
    worker.say("ready")
    if worker.rank == 2:
        listener.wait()
    assert listener.frozen.wait(LIMIT)
    worker.host.where = Situation.ATTEMPT
    grads = step(net, worker.rank, 2)
    return len(grads), ddp.bucket_order(net) is not None


def test_a_wholly_void_backward_ends_without_an_error() -> None:
    with Job(void_forward_and_backward) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        assert job.results(0, 1) == [(14, True)] * 2


class Inside(nn.Module):
    """Its first layer's backward runs inside the backward of the rest; `between` is called between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(40, 40), nn.Linear(40, 40)
        self.between: Callable[[], None] | None = None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = checkpoint(self.inner, value.requires_grad_(), use_reentrant=True)
        if self.between is not None:
            value.register_hook(lambda _: self.between())
        return self.head(value)


def lose_inside_a_backward(worker: Worker) -> Any:
    """One bucket is launched in the outer backward, one in the inner one, which waits for both; a loss between them."""
    listener = begin(worker)
    inside = Inside()
    net = DistributedDataParallel(inside, bucket_cap_mb=0.002)
    worker.host.where = Situation.ATTEMPT
    for number in range(2):
        step(net, worker.rank, number)
    assert len(buckets(net)) > 1
    worker.say("ready")

    def between() -> None:
        listener.wait() if worker.rank == 2 else listener.frozen.wait(LIMIT)

    inside.between = between
    return len(step(net, worker.rank, 2))


def test_a_loss_between_an_outer_and_an_inner_backward_holds_nobody_up() -> None:
    with Job(lose_inside_a_backward) as job:
        assert {job.heard(rank) for rank in range(3)} == {"ready"}
        lose(job, 2)
        assert job.results(0, 1) == [4] * 2


def fail() -> None:
    raise RuntimeError("lost")


def backward_with(hook: Callable[[], object]) -> None:
    with torch.enable_grad():
        one = torch.ones(1, requires_grad=True) * 2
    one.register_hook(lambda _: (hook(), None)[1])
    one.backward()


def test_a_backward_that_failed_does_not_fail_the_next_one_while_its_exception_is_kept() -> None:
    waited: list[str] = []
    with pytest.raises(RuntimeError, match="lost") as kept:
        backward_with(lambda: backward.await_at_end(fail))
    backward_with(lambda: backward.await_at_end(lambda: waited.append("next")))
    assert waited == ["next"]
    assert kept.tb is not None


def test_a_backward_whose_work_failed_in_one_inside_of_it_fails_too() -> None:
    def outer() -> None:
        backward.await_at_end(fail)
        with pytest.raises(RuntimeError, match="lost"):
            backward_with(lambda: backward.await_at_end(lambda: None))

    with pytest.raises(RuntimeError, match="lost"):
        backward_with(outer)


def adopt_wrongly(worker: Worker) -> Any:
    begin(worker)
    net = wrapped()
    for number in range(2):
        step(net, worker.rank, number)
    order = ddp.bucket_order(net)
    assert order is not None
    other = DistributedDataParallel(nn.Linear(2, 2))
    try:
        ddp.adopt_bucket_order(other, order)
    except StateMismatchError as error:
        return str(error)
    return ""


def test_an_order_of_another_model_is_refused() -> None:
    with Job(adopt_wrongly) as job:
        for text in job.results():
            assert "of another model" in text


def look_for_wrappers(worker: Worker) -> list[bool]:
    begin(worker)
    net, other = Crossed(), nn.Linear(3, 3)
    first = DistributedDataParallel(net)
    second, third = DistributedDataParallel(other), DistributedDataParallel(net)
    part = net.layers[2].parameters()
    return [
        ddp.wrappers_of(part) == [third],  # the newest, though the first one lives
        ddp.wrappers_of([other.weight, *net.parameters()]) == [second, third],
        ddp.wrappers_of(nn.Linear(3, 3).parameters()) == [],
        first.module is net,
    ]


def test_ddp_modules_are_found_by_any_of_their_parameters_in_the_order_in_which_they_were_made() -> None:
    with Job(look_for_wrappers) as job:
        assert all(all(found) for found in job.results())
