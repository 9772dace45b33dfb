"""Times the gate and one small collective, protected and native calls in turns, inside the same processes.

On an accelerator a call returns when the collective is queued: `issued` is that time, and the time of the whole block
counts its end on the device too.

Writes micro-<rank>.json: medians over many pairs of blocks, in microseconds per call, and when this rank came to each
gate and left it, by the clock that all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from statistics import median

import accelerator
import torch
import torch.distributed as dist
from steplog import FOLDER
from torch import nn

import checkpointless_elastic as ce

CALLS, PAIRS = 20, int(os.environ.get("BENCH_PAIRS", "150"))


def native_group() -> dist.ProcessGroup:
    """A gloo or NCCL group as torch makes it, beside the elastic one of this process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    server = dist.TCPStore("localhost", 0, size, rank == 0, wait_for_workers=False) if rank == 0 else None
    ports = [server.port if server else 0]
    dist.broadcast_object_list(ports)
    store = server or dist.TCPStore("localhost", int(ports[0]), size, False)
    return accelerator.native_group(dist.PrefixStore("native", store), rank, size)


def timed(call: Callable[[], object], only_issue: bool = False) -> float:
    """Microseconds per call in one block, until its end on the device."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = time.perf_counter() - start
    accelerator.settle()
    return (seconds if only_issue else time.perf_counter() - start) / CALLS * 1e6


def in_turns(
    pairs: Iterable[int], first: Callable[[], float], second: Callable[[], float]
) -> tuple[float, float]:
    """Median of the first, and median of what the second takes more, over pairs in the order ABBA."""
    firsts: list[float] = []
    more: list[float] = []
    for pair in pairs:
        if pair % 2:
            slow, fast = second(), first()
        else:
            fast, slow = first(), second()
        firsts.append(fast)
        more.append(slow - fast)
    return median(firsts), median(more)


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(1, 1, bias=False).to(accelerator.KIND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.weight.grad = torch.ones_like(model.weight)
    return model, optimizer


def main() -> None:
    device = accelerator.join()
    native = native_group()
    torch.manual_seed(0)
    model, optimizer = small()
    _, other = small()
    run = ce.Run(model=model, optimizer=optimizer)
    number = torch.zeros(1, device=device)

    came: list[float] = []
    left: list[float] = []
    optimizer.register_step_pre_hook(
        lambda *_: left.append(time.perf_counter() * 1e6)
    )  # runs right after the gate

    @run.replayable
    def protected_step() -> None:
        came.append(time.perf_counter() * 1e6)
        optimizer.step()

    @run.replayable
    def block(group: dist.ProcessGroup | None, only_issue: bool = False) -> float:
        """Inside a replayable function, as a training step calls its collectives."""
        return timed(lambda: dist.all_reduce(number, group=group), only_issue)

    for _ in range(3):
        protected_step()
        other.step()
    step_us, call_us = in_turns(run.steps(PAIRS), lambda: timed(other.step), lambda: timed(protected_step))
    native_us, added_us = in_turns(run.steps(PAIRS), lambda: block(native), lambda: block(None))
    issued = 0.0, 0.0
    if accelerator.KIND != "cpu":
        issued = in_turns(run.steps(PAIRS), lambda: block(native, True), lambda: block(None, True))
    found = {
        "gates": list(zip(came, left, strict=True)),
        "call_us": call_us,
        "plain_step_us": step_us,
        "native_us": native_us,
        "added_us": added_us,
        "issued_us": issued,
    }
    (FOLDER / f"micro-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
