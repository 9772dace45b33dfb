"""A job whose weights depend on every sample, on their order on each rank, and on each rank's random draws.

Under the checkpointless backend it is a script as users write them. KILL and HOLD name ranks and steps ("1:5,0:9"): the
agent of that rank's node is killed in that step's backward, or the rank waits at its start for OUT/go-RANK-STEP. DIE
names ranks and numbers of ranks: that worker dies before its first step in a run by so many.

With STEPS it is plain torch and makes so many steps, or all that are left: it starts from the files that such a run has
left in PLAIN, if there are any, those of the ranks that RNG names ("0,1,4"), and deals what is left of the epoch to the
ranks that it has. It leaves the same in OUT. With HSDP the model is sharded, else it is a DDP.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import checkpointless_elastic as ce

OUT = os.environ["OUT"]
EPOCHS, SAMPLES, BATCH = 2, 200, 4
PLAIN = os.environ.get("PLAIN", "")


class Numbers(Dataset[tuple[int, torch.Tensor]]):
    """Sample i, and what is learnt of it."""

    inputs = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.inputs[index]


def once(name: str) -> bool:
    """Is this the first time? Over all processes."""
    try:
        os.close(os.open(f"{OUT}/did-{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def due(name: str, rank: int, step: int) -> bool:
    return f"{rank}:{step}" in os.environ.get(name, "").split(",") and once(f"{name}-{rank}-{step}")


def hold(rank: int, step: int) -> None:
    if due("HOLD", rank, step):
        while not os.path.exists(f"{OUT}/go-{rank}-{step}"):
            time.sleep(0.01)


def agent() -> int:
    return int(os.environ["CHECKPOINTLESS_RUN_DIR"].split("checkpointless-")[1].split("-")[0])


def strike(rank: int, step: int) -> None:
    if due("KILL", rank, step):
        os.kill(agent(), signal.SIGKILL)
        signal.pause()


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(1)
model: nn.Module
if os.environ.get("HSDP"):  # as many replicas of 2 shards as there is room for
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 16))
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
else:
    layers = nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 16)
    model = DistributedDataParallel(nn.Sequential(*layers))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(100 + rank)
log = open(f"{OUT}/seen-{os.getpid()}-{world}-{rank}.log", "a")


def compute(x: torch.Tensor, step: int) -> torch.Tensor:
    hold(rank, step)
    loss = ((model(x + 0.1 * torch.randn_like(x)) - x) ** 2).mean()
    strike(rank, step)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def note(step: int, epoch: int, indices: torch.Tensor) -> None:
    """Samples of a step that is committed."""
    log.write(f"{step} {epoch} {','.join(map(str, indices.tolist()))}\n")
    log.flush()


def protected() -> int:
    with open(f"{OUT}/agent-{rank}", "w") as known:
        known.write(str(agent()))
    if due("DIE", rank, world):
        os.kill(os.getpid(), signal.SIGKILL)
    run = ce.Run(model=model, optimizer=optimizer)
    step = run.replayable(lambda x: compute(x, run.step))
    sampler: Any = DistributedSampler(Numbers(), shuffle=True)
    loader = DataLoader(Numbers(), batch_size=BATCH, sampler=sampler)
    for epoch in run.epochs(EPOCHS):
        sampler.set_epoch(epoch)
        for indices, x in run.batches(loader):
            step(x)
            if run.step % 4 == 1:
                average = x.mean()
                dist.all_reduce(average)
            note(run.step, epoch, indices)
    return run.step


def left(epoch: int, used: int) -> list[list[int]]:
    """Batches of this rank, of what is left of an epoch when so many samples were used."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()[used:]
    order += order[: -len(order) % world]
    mine = order[rank::world]
    return [mine[at : at + BATCH] for at in range(0, len(mine), BATCH)]


def tensors() -> dict[str, torch.Tensor]:
    """All that this rank holds of the model and the optimizer."""
    found = dict(model.state_dict())
    for number, state in enumerate(optimizer.state.values()):
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return {name: getattr(value, "_local_tensor", value).detach() for name, value in found.items()}


def take_up(kept: dict[str, torch.Tensor]) -> None:
    """Make the optimizer's state, then take all of it from the phase before."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for name, value in tensors().items():
        value.copy_(kept[name])


def plain() -> int:
    step, first, used, random = 0, 0, 0, None
    if os.path.exists(f"{PLAIN}/rank-0.pt"):
        kept: Any = torch.load(f"{PLAIN}/rank-{os.environ['RNG'].split(',')[rank]}.pt")
        take_up(kept["tensors"])
        step, first, used = kept["at"]
        random = kept["rng"]
    last = int(os.environ["STEPS"])
    for epoch in range(first, EPOCHS):
        loader = iter(DataLoader(Numbers(), batch_sampler=left(epoch, used)))
        if random is not None:  # in the middle of a pass, whose iterator was made long ago
            torch.set_rng_state(random)
            random = None
        while step != last:
            try:
                indices, x = next(loader)
            except StopIteration:
                break
            compute(x, step)
            step, used = step + 1, used + BATCH * world
            note(step, epoch, indices)
        if step == last:
            kept = {"tensors": tensors(), "rng": torch.get_rng_state(), "at": (step, epoch, used)}
            torch.save(kept, f"{OUT}/rank-{rank}.pt")
            break
        used = 0
    return step


steps = plain() if "STEPS" in os.environ else protected()
final = {"tensors": tensors(), "rng": torch.get_rng_state(), "step": steps, "world": world}
torch.save(final, f"{OUT}/final-{rank}.pt")
dist.destroy_process_group()
