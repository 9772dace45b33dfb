"""Four steps of DDP. With ranks 0 and 2, and 1 and 3, in groups of their own, each step ends with a reduction there.

With LATE a last reduction of all is done when the interpreter ends. Rank R waits for OUT/go-R before the end of step 2
(FAULTS "2:pairs") or after the loop ("0:end"); "kill" instead of a wait is written "1:kill".
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

OUT, RANK = Path(os.environ["OUT"]), int(os.environ["RANK"])
FAULTS = os.environ["FAULTS"].split(",")


def known(path: Path) -> bool:
    """Whether it was there before; it is from now on."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def moment(name: str) -> None:
    fault = f"{RANK}:{name}"
    if fault not in FAULTS or known(OUT / fault):
        return
    while not (OUT / f"go-{RANK}").exists():
        time.sleep(0.01)
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def late() -> None:
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        (OUT / f"late-{RANK}").write_text(str(error))


(OUT / f"agent-{RANK}").write_text(
    os.environ["CHECKPOINTLESS_RUN_DIR"].split("checkpointless-")[1].split("-")[0]
)
if "LATE" in os.environ:
    atexit.register(late)
dist.init_process_group("gloo")
if dist.get_world_size() == 4:
    pair = [dist.new_group([0, 2]), dist.new_group([1, 3])][RANK % 2]
model = DistributedDataParallel(nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = ce.Run(model=model, optimizer=optimizer)


@run.replayable
def step() -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


for number in run.steps(4):
    step()
    if number == 2:
        moment("kill")
        moment("pairs")
        known(OUT / f"there-{RANK}")
    if dist.get_world_size() == 4:
        dist.all_reduce(torch.ones(1), group=pair)
(OUT / f"trained-{RANK}").touch()
moment("end")
