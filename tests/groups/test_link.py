"""What a link decides by itself, and who holds it."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from checkpointless_elastic.groups.link import Link
from checkpointless_elastic.groups.waiting import AbortableFuture

LIMIT_S = 30.0


def on_meta(native: object = None) -> Link:
    """A link whose accelerator is one that every machine has."""
    return Link(native, 0, device=torch.device("meta"))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (([torch.ones(1)],), False),
        (([torch.ones(1, device="meta")],), True),
        (([[torch.ones(1)]], [torch.ones(1)]), False),
        ((), True),  # a barrier, or a batch
    ],
)
def test_gloo_beside_nccl_carries_out_what_is_on_the_cpu(args: tuple[object, ...], expected: bool) -> None:
    assert on_meta().on_device(args, {}) is expected
    assert on_meta().on_device((), {"tensors": args}) is expected
    assert not Link(None, 0).on_device(args, {})


class Dependent:
    """A native group whose abort ends only while that of the other one is under way, as kernels in one queue do."""

    def __init__(self, both: threading.Barrier, ended: threading.Semaphore) -> None:
        self.both, self.ended = both, ended

    def _get_backend(self, device: torch.device) -> Dependent:
        return self

    def abort(self) -> None:
        self.both.wait(LIMIT_S)
        self.ended.release()


def test_communicators_are_aborted_side_by_side() -> None:
    both, ended = threading.Barrier(2), threading.Semaphore(0)
    for _ in range(2):
        on_meta(Dependent(both, ended)).abort_device()
    assert ended.acquire(timeout=LIMIT_S)
    assert ended.acquire(timeout=LIMIT_S)


def test_a_future_that_is_under_way_does_not_hold_the_link() -> None:
    """Else a thread of gloo, which completes it, could be the last to let go of the native group."""
    link, native = Link(object(), 0), torch.futures.Future()
    handed_out = AbortableFuture(native, list, link)
    gone = weakref.ref(link)
    del link
    assert gone() is None
    native.set_result([torch.ones(1)])
    assert handed_out.future.value() == [torch.ones(1)]


def test_an_error_of_a_void_group_completes_a_future_with_the_outputs() -> None:
    results = []
    for void in (False, True):
        link, native = Link(object(), 0, void=void), torch.futures.Future()
        handed_out = AbortableFuture(native, lambda: [torch.zeros(1)], link)
        native.set_exception(RuntimeError("the connection was closed"))
        results.append(handed_out.future)
    with pytest.raises(RuntimeError, match="the connection was closed"):
        results[0].value()
    assert results[1].value() == [torch.zeros(1)]


def pair() -> list[ProcessGroupGloo]:
    """Both members of a gloo group, in this process."""
    store, limit = dist.HashStore(), timedelta(seconds=LIMIT_S)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda rank: ProcessGroupGloo(store, rank, 2, limit), range(2)))


@pytest.mark.parametrize("name", ["allreduce", "_reduce_scatter_base"])
def test_a_wait_ends_when_its_group_becomes_void_though_the_native_operation_does_not(name: str) -> None:
    groups = pair()

    def issue(rank: int) -> dist.Work:
        whole = torch.ones(2)
        work: dist.Work = getattr(groups[rank], name)(
            *([torch.zeros(1), whole] if "scatter" in name else [[whole]])
        )
        return work

    link = Link(groups[0], 0)
    native = issue(0)  # nobody else takes part yet, and no connection is shut
    threading.Timer(0.1, lambda: setattr(link, "void", True)).start()
    with pytest.raises(RuntimeError):
        link.wait(native)
    issue(1).wait()
    native.wait()
