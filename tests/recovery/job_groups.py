"""Four ranks and several groups: all (used at the start and the end), two halves (each step), a pair (as all).

Rank 1 dies once at step 5. DIE=late: when ranks 2 and 3 have done their part of it. DIE=early: when rank 2 is about to
wait for rank 3, which begins the step after it has heard of the loss. Both halves are given the same batches, so that
all ranks hold the same state.
"""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist
from torch import nn

import checkpointless_elastic as ce
from checkpointless_elastic.worker import session

OUT, DIE = os.environ["OUT"], os.environ.get("DIE", "")
STEPS, LOST_AT = 9, 5

dist.init_process_group("gloo")
rank = dist.get_rank()
halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
half, pair = halves[rank // 2], dist.new_group([1, 2])
store = dist.distributed_c10d._get_default_store()


def pass_on(value: float) -> float:
    """Rank 1 sends to rank 2 through their pair."""
    tensor = torch.tensor([value if rank == 1 else 0.0])
    if rank == 1:
        dist.send(tensor, 2, group=pair)
    if rank == 2:
        dist.recv(tensor, 1, group=pair)
    return tensor.item()


def die_once() -> None:
    """Rank 1, when the other half is where DIE says."""
    store.wait(["reduced/2", "reduced/3"] if DIE == "late" else ["begun/2"])
    try:
        os.close(os.open(f"{OUT}/died", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


dist.all_reduce(seed := torch.tensor([1.0]))
assert pass_on(3.5) in (0.0, 3.5)
torch.manual_seed(int(seed))
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run = ce.Run(model=model, optimizer=optimizer)
torch.manual_seed(10 + rank % 2)


def has_heard() -> bool:
    """True once this rank knows of the loss."""
    found = session.current()
    return found is not None and found.is_frozen()


@run.replayable
def train_step(x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    if DIE and rank == 1 and run.step == LOST_AT:
        die_once()
    if run.step == LOST_AT:
        store.set(f"begun/{rank}", "done")
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=half)
    if run.step == LOST_AT:
        store.set(f"reduced/{rank}", "done")
    optimizer.step()
    optimizer.zero_grad()


for _ in run.steps(STEPS):
    while DIE == "early" and rank == 3 and run.step == LOST_AT and not has_heard():
        os.sched_yield()
    train_step(torch.randn(8, 16))
passed = pass_on(7.5)
dist.all_reduce(total := torch.tensor([rank + 1.0]))
final = {
    "model": model.state_dict(),
    "rng": torch.get_rng_state(),
    "values": (run.step, passed, total.item()),
}
torch.save(final, f"{OUT}/final-{rank}.pt")
