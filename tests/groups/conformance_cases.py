"""Every public collective as a function of a group; its result is compared on a native and an elastic group."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Case = Callable[[Any, int, int], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def own(rank: int, length: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values that differ by rank and are not sums of powers of two."""
    return (torch.arange(length, dtype=torch.float64) * 1.7 + rank * 0.3 + 0.1).to(dtype)


def slots(size: int, length: int = 6) -> list[Tensor]:
    return [torch.zeros(length) for _ in range(size)]


def attempted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The error that a call gives, as text."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "<object>", f"{type(error).__name__}: {error}")
    return "no error"


@case
def broadcast(group: Any, rank: int, size: int) -> Any:
    tensor = own(rank)
    dist.broadcast(tensor, 1, group=group)
    later = own(rank)
    work = dist.broadcast(later, group_src=2, group=group, async_op=True)
    assert isinstance(work, dist.Work)
    return tensor, work.wait(), later, work.is_completed()


@case
def all_reduce(group: Any, rank: int, size: int) -> Any:
    found = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
            tensor = own(rank, 5, dtype)
            dist.all_reduce(tensor, op, group=group)
            found.append(tensor)
    work = dist.all_reduce(late := own(rank), group=group, async_op=True)
    work.wait(timedelta(seconds=20))
    return found, late


@case
def all_reduce_of_complex_sparse_and_strided(group: Any, rank: int, size: int) -> Any:
    number = torch.complex(own(rank), own(rank + 1))
    dist.all_reduce(number, group=group)
    sparse = torch.eye(4).mul(rank + 1).to_sparse()
    dist.all_reduce(sparse, group=group)
    scalar = torch.tensor(rank + 0.5)
    dist.all_reduce(scalar, group=group)
    return number, sparse.to_dense(), scalar


@case
def all_reduce_futures(group: Any, rank: int, size: int) -> Any:
    tensor = own(rank)
    future = dist.all_reduce(tensor, group=group, async_op=True).get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    return doubled.wait(), future.value()


@case
def all_reduce_coalesced(group: Any, rank: int, size: int) -> Any:
    tensors = [own(rank, 3), own(rank, 5)]
    dist.all_reduce_coalesced(tensors, group=group)
    again = [own(rank, 3), own(rank, 5)]
    future = dist.all_reduce_coalesced(again, group=group, async_op=True)
    return tensors, future.wait(), again


@case
def coalescing_manager(group: Any, rank: int, size: int) -> Any:
    first, second = own(rank, 4), own(rank, 2)
    with dist._coalescing_manager(group=group):
        dist.all_reduce(first, group=group)
        dist.all_reduce(second, group=group)
    out = [torch.zeros(2 * size), torch.zeros(3 * size)]
    with dist._coalescing_manager(group=group, async_ops=True) as manager:
        dist.all_gather_into_tensor(out[0], own(rank, 2), group=group)
        dist.all_gather_into_tensor(out[1], own(rank, 3), group=group)
    manager.wait()
    parts = [torch.zeros(2), torch.zeros(1)]
    with dist._coalescing_manager(group=group):
        dist.reduce_scatter_tensor(parts[0], own(rank, 2 * size), group=group)
        dist.reduce_scatter_tensor(parts[1], own(rank, size), group=group)
    return first, second, out, parts


@case
def reduce(group: Any, rank: int, size: int) -> Any:
    tensor = own(rank)
    dist.reduce(tensor, 1, group=group)
    return tensor if rank == 1 else None


@case
def all_gather(group: Any, rank: int, size: int) -> Any:
    gathered = slots(size)
    dist.all_gather(gathered, own(rank), group=group)
    single = torch.zeros(size * 6)
    dist.all_gather_into_tensor(single, own(rank), group=group)
    stacked = torch.zeros(size * 6)
    dist._all_gather_base(stacked, own(rank), group=group)
    work = dist.all_gather(later := slots(size), own(rank), group=group, async_op=True)
    return gathered, single, stacked, work.get_future().wait(), later


@case
def all_gather_coalesced(group: Any, rank: int, size: int) -> Any:
    inputs = [own(rank, 2), own(rank, 3)]
    outputs = [[torch.zeros(2), torch.zeros(3)] for _ in range(size)]
    dist.all_gather_coalesced(outputs, inputs, group=group)
    return outputs


@case
def gather_and_scatter(group: Any, rank: int, size: int) -> Any:
    gathered = slots(size) if rank == 2 else None
    dist.gather(own(rank), gathered, dst=2, group=group)
    out = torch.zeros(6)
    dist.scatter(out, [own(index) for index in range(size)] if rank == 1 else None, src=1, group=group)
    return gathered, out


@case
def reduce_scatter(group: Any, rank: int, size: int) -> Any:
    out = torch.zeros(2)
    dist.reduce_scatter(out, list(own(rank, 2 * size).chunk(size)), group=group)
    single = torch.zeros(2)
    dist.reduce_scatter_tensor(single, own(rank, 2 * size), group=group)
    base = torch.zeros(2)
    dist._reduce_scatter_base(base, own(rank, 2 * size), group=group)
    return out, single, base


@case
def all_to_all(group: Any, rank: int, size: int) -> Any:
    single = torch.zeros(2 * size)
    dist.all_to_all_single(single, own(rank, 2 * size), group=group)
    uneven = torch.zeros(size * (rank + 1))
    given = [index + 1 for index in range(size)]
    dist.all_to_all_single(uneven, own(rank, sum(given)), [rank + 1] * size, given, group=group)
    outcome = attempted(dist.all_to_all, slots(size, 2), list(own(rank, 2 * size).chunk(size)), group=group)
    return single, uneven, outcome


@case
def objects(group: Any, rank: int, size: int) -> Any:
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank}, group=group)
    sent = [f"from {rank}", rank] if rank == 0 else [None, None]
    dist.broadcast_object_list(sent, 0, group=group)
    at_root: list[Any] | None = [None] * size if rank == 1 else None
    dist.gather_object((rank, "g"), at_root, dst=1, group=group)
    mine: list[Any] = [None]
    dist.scatter_object_list(
        mine, [f"for {index}" for index in range(size)] if rank == 0 else None, 0, group=group
    )
    if rank == 0:
        dist.send_object_list(["hello", 3], 1, group=group)
    heard: list[Any] = [None, None]
    if rank == 1:
        dist.recv_object_list(heard, 0, group=group)
    return gathered, sent, at_root, mine, heard


@case
def point_to_point(group: Any, rank: int, size: int) -> Any:
    tensor = own(rank)
    if rank == 0:
        dist.send(tensor, 1, group=group, tag=7)
        dist.isend(tensor, 2, group=group).wait()
    sender = None
    if rank == 1:
        sender = dist.recv(tensor, 0, group=group, tag=7)
    if rank == 2:
        sender = dist.recv(tensor, group=group)
    return tensor, sender


@case
def batched_point_to_point(group: Any, rank: int, size: int) -> Any:
    received = torch.zeros(6)
    ops = [
        dist.P2POp(dist.isend, own(rank), (rank + 1) % size, group),
        dist.P2POp(dist.irecv, received, (rank - 1) % size, group),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return received


@case
def barriers(group: Any, rank: int, size: int) -> Any:
    dist.barrier(group=group)
    work = dist.barrier(group=group, async_op=True)
    work.wait()
    dist.monitored_barrier(group=group, timeout=timedelta(seconds=20), wait_all_ranks=True)
    return work.get_future().wait()


@case
def direct_methods(group: Any, rank: int, size: int) -> Any:
    """The short forms of a group's own methods."""
    group.allreduce(reduced := own(rank)).wait()
    group.allreduce([listed := own(rank)], dist.ReduceOp.MAX).wait()
    group.broadcast(sent := own(rank), 1).wait()
    group.allgather(gathered := slots(size), own(rank)).wait()
    group.reduce(rooted := own(rank), 0).wait()
    group.gather([slots(size)] if rank == 0 else [], [own(rank)]).wait()
    group.reduce_scatter(part := torch.zeros(2), list(own(rank, 2 * size).chunk(size))).wait()
    group.barrier().wait()
    return reduced, listed, sent, gathered, rooted if rank == 0 else None, part


@case
def functional_collectives(group: Any, rank: int, size: int) -> Any:
    ranks = list(range(size))
    return [
        functional.all_reduce(own(rank), "sum", group).wait(),
        functional.all_gather_tensor(own(rank), 0, group).wait(),
        functional.reduce_scatter_tensor(own(rank, 2 * size), "sum", 0, group).wait(),
        functional.all_to_all_single(own(rank, size), None, None, group).wait(),
        functional.broadcast(own(rank), 1, group).wait(),
        [out.wait() for out in functional.all_reduce_coalesced([own(rank, 2), own(rank, 3)], "sum", group)],
        functional.permute_tensor(own(rank), [*ranks[1:], 0], group).wait(),
    ]


@case
def functional_collectives_have_gradients(group: Any, rank: int, size: int) -> Any:
    tensor = own(rank).requires_grad_()
    functional.all_gather_tensor_autograd(tensor, 0, group).wait().pow(2).sum().backward()
    return tensor.grad


@case
def what_it_says_of_itself(group: Any, rank: int, size: int) -> Any:
    return (
        dist.get_backend(group),
        dist.get_rank(group),
        dist.get_world_size(group),
        dist.get_process_group_ranks(group),
        group.name(),
        group._get_backend_name(),
        sorted(device.type for device in group._device_types),
        type(group._get_backend(torch.device("cpu"))).__name__,
        group.bound_device_id,
        dist.get_group_rank(group, 1),
        group._has_hooks(),
        isinstance(group.get_group_store(), dist.Store),
    )


@case
def wrong_arguments(group: Any, rank: int, size: int) -> Any:
    """Errors that are raised before anything is sent; every rank makes the same ones."""
    three = torch.zeros(3)
    return [
        attempted(dist.all_reduce, "text", group=group),
        attempted(dist.all_reduce, torch.eye(2).to_sparse(), dist.ReduceOp.MAX, group=group),
        attempted(dist.all_reduce, torch.zeros(2, dtype=torch.complex64), dist.ReduceOp.MAX, group=group),
        attempted(dist.all_gather, [torch.zeros(4)] * size, three, group=group),
        attempted(dist.all_gather, [three], three, group=group),
        attempted(dist.all_gather, [torch.zeros(3, dtype=torch.int64)] * size, three, group=group),
        attempted(dist.broadcast, three, size + 4, group=group),
        attempted(dist.broadcast, three, group=group),
        attempted(dist.gather, three, None, dst=rank, group=group),
        attempted(dist.scatter, three, None, src=rank, group=group),
        attempted(dist.send, three, rank, group=group),
        attempted(dist.batch_isend_irecv, []),
        attempted(dist.batch_isend_irecv, [three]),
        attempted(dist.all_to_all_single, torch.zeros(4), torch.zeros(4), [1, 1], [1, 1], group=group),
        attempted(dist.monitored_barrier, group, "soon"),
        attempted(group.allreduce, [three, torch.zeros(2, dtype=torch.int32)]),
        attempted(group.allreduce, []),
        attempted(group.broadcast, [three], None),
        attempted(group._get_backend, torch.device("mps")),
    ]


@case
def a_timeout_is_an_error(group: Any, rank: int, size: int) -> Any:
    """The text names ports and times, so that only its kind is compared."""
    if rank == 0:
        outcome = attempted(
            dist.all_reduce(own(rank), group=group, async_op=True).wait, timedelta(milliseconds=5)
        )
        return outcome.split(":")[0]
    return None


def run(name: str, group: Any, rank: int, size: int) -> Any:
    """The result of a case, in plain values."""
    torch.manual_seed(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain(CASES[name](group, rank, size))


def plain(value: Any) -> Any:
    """Tensors as their bytes."""
    if isinstance(value, Tensor):
        dense = value.detach().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), dense.view(torch.uint8).numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
