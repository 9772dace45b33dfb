"""What a link with an NCCL backend decides by itself, without a GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from checkpointless_elastic.groups.link import Link

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
