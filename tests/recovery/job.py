"""A training script that dies where FAULTS says, each fault once: "rank:step:moment:kind", separated by commas.
Kinds "node", "term" and "stop" are for the agent of this rank's node, "node2" for that of rank 2; "holdNAME" waits for
the file OUT/go-NAME.

Writes per rank and step a line "pid step" to OUT/steps-RANK.log, and all that must be equal to OUT/final-RANK.pt.
The rank SLOW_RANK takes a second longer for each step.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import held
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import checkpointless_elastic as ce

OUT = os.environ["OUT"]
EPOCHS, STEPS = 2, 12
FAULTS = [fault.split(":") for fault in os.environ.get("FAULTS", "").split(",") if fault]


class Boom(Exception):
    """A fault of kind "raise", or "linger"."""


def linger() -> None:
    """A process that has failed closes its connections, as the end of the interpreter does, and ends later."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            if connection.family != socket.AF_UNIX and connection.getpeername():  # not one that listens
                connection.shutdown(socket.SHUT_RDWR)
    time.sleep(3)


def agent_of(number: str) -> int:
    """The agent of a rank's node, that of this one without a number."""
    return int(open(f"{OUT}/agent-{number or os.environ['RANK']}").read())


def strike_node(kind: str, number: str) -> None:
    """Ends ("node"), asks to end ("term") or stops ("stop") an agent; its workers die with it."""
    numbers = {"node": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
    os.kill(agent_of(number), numbers[kind])
    while kind == "node" and not number:
        signal.pause()


def hold(name: str) -> None:
    """Waits for a file that a test makes when it has done its part."""
    while not os.path.exists(f"{OUT}/go-{name}"):
        time.sleep(0.01)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def freeze_soon() -> None:
    threading.Timer(0.1, freeze).start()


def spin() -> None:
    while True:
        pass


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


def deadlock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def hold_at_exit() -> None:
    """From here on SIGKILL does not end this process, see held.py."""
    held.hold(OUT)
    spin()


HANGS = {
    "held": hold_at_exit,
    "freeze": freeze,
    "freezesoon": freeze_soon,
    "pause": functools.partial(time.sleep, 0.3),
    "slow": functools.partial(time.sleep, 2.0),
    "spin": spin,
    "block": hold_the_interpreter,
    "deadlock": deadlock,
}


def fail(kind: str, name: str) -> None:
    if kind[:4] in ("node", "term", "stop"):
        strike_node(kind[:4], kind[4:])
        return
    if kind.startswith("hold"):
        hold(kind[4:])
        return
    if kind in HANGS:
        HANGS[kind]()
        return
    if kind in ("linger", "lingerexit"):
        atexit.register(linger)
    if kind in ("raise", "linger"):
        raise Boom(name)
    if kind == "exit":
        os._exit(7)
    if kind in ("sysexit", "lingerexit"):
        sys.exit(3)
    numbers = {"segv": signal.SIGSEGV, "freeze": signal.SIGSTOP}
    os.kill(os.getpid(), numbers.get(kind, signal.SIGKILL))


def moment(name: str, step: int) -> None:
    for rank, at, where, kind in FAULTS:
        if (int(rank), int(at), where) != (int(os.environ["RANK"]), step, name):
            continue
        marker = f"{OUT}/{rank}-{at}-{where}"
        again = {"always": 3, "slow": 8}.get(kind) or (int(kind[4:] or 1) if kind.startswith("kill") else 1)
        for number in range(again):
            try:
                os.close(os.open(f"{marker}-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            fail("raise" if kind == "always" else kind, "always" if kind == "always" else name)
            break


if "CHECKPOINTLESS_RUN_DIR" in os.environ:
    with open(f"{OUT}/agent-{os.environ['RANK']}", "w") as known:
        known.write(os.environ["CHECKPOINTLESS_RUN_DIR"].split("checkpointless-")[1].split("-")[0])

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
run_id: list[Any] = [os.urandom(8).hex() if rank == 0 else None]
dist.broadcast_object_list(run_id)
hosts: list[Any] = [None] * world
dist.all_gather_object(hosts, (socket.gethostname(), run_id[0]))
assert len({found for _, found in hosts}) == 1, hosts

torch.manual_seed(1)
net = nn.Sequential(
    nn.Linear(32, 64),
    nn.BatchNorm1d(64),
    nn.ReLU(),
    nn.Dropout(0.2),
    nn.Linear(64, 64),
    nn.ReLU(),
    nn.Linear(64, 8),
)
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler)
torch.manual_seed(100 + rank)
inputs, labels = torch.randn(2048, 32, generator=torch.Generator().manual_seed(5)), torch.arange(2048) % 8


class Data(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        moment("fetch", run.step)
        return super().__getitem__(index)


data = Data(inputs, labels)
sampler: Any = DistributedSampler(data, shuffle=True)
loader = DataLoader(data, batch_size=8, sampler=sampler)
os.environ["REPLACEMENT"] = str(ce.is_replacement())
if ce.is_replacement():
    moment("setup", 0)


@run.replayable
def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    moment("start", run.step)
    if os.environ.get("SLOW_RANK") == str(rank):
        time.sleep(1)
    loss = cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
    moment("forward", run.step)
    loss.backward()
    moment("backward", run.step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    moment("stepped", run.step)
    scheduler.step()
    optimizer.zero_grad()
    return loss


@run.replayable
def evaluate() -> float:
    model.eval()
    with torch.no_grad():
        right = (model(inputs[rank::world]).argmax(1) == labels[rank::world]).sum()
        moment("evaluate", run.step)
        dist.all_reduce(right)
    model.train()
    return float(right) / len(inputs)


@run.replayable
def save(epoch: int) -> None:
    moment("save", run.step)
    if rank == 0:
        torch.save(net.state_dict(), f"{OUT}/checkpoint-{epoch}.pt")
    dist.barrier()


losses, accuracies = [], []
log = open(f"{OUT}/steps-{rank}.log", "a")
for epoch in run.epochs(EPOCHS):
    sampler.set_epoch(epoch)
    for number, (x, y) in run.numbered(loader):
        moment("load", run.step)
        loss = train_step(x, y)
        moment("between", run.step)
        if number % 4 == 3:
            average = loss.detach().clone()
            dist.all_reduce(average)
            moment("outside", run.step)
        log.write(f"{os.getpid()} {run.step} {loss.item()}\n")
        log.flush()
        if number + 1 == STEPS:
            break
    accuracy = evaluate()
    save(epoch)
moment("after", run.step)
dist.barrier()
moment("passed", run.step)
final = {
    "model": net.state_dict(),
    "optimizer": optimizer.state_dict(),
    "scheduler": scheduler.state_dict(),
    "rng": torch.get_rng_state(),
    "values": (run.step, float(loss), float(average), accuracy),
}
torch.save(final, f"{OUT}/final-{rank}.pt")
sys.stdout.write(
    f"rank {rank} finished, run {run_id[0]}\n"
)  # in one piece: print writes the end of the line by itself
dist.destroy_process_group()
moment("destroyed", run.step)
