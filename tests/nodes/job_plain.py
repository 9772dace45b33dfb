"""A script without a Run: it trains nothing, it adds up; dies as FAULTS says, see job.py, in its first run only."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist

OUT, RUN = os.environ["OUT"], os.environ["TORCHELASTIC_RESTART_COUNT"]
FAULTS = [fault.split(":") for fault in os.environ.get("FAULTS", "").split(",") if fault]

dist.init_process_group("gloo")
rank, total = dist.get_rank(), torch.zeros(1)
for step in range(10):
    for lost, at, kind in FAULTS:
        if (int(lost), int(at), RUN) == (rank, step, "0"):
            agent = os.environ["CHECKPOINTLESS_RUN_DIR"].split("checkpointless-")[1].split("-")[0]
            os.kill(int(agent) if kind == "node" else os.getpid(), signal.SIGKILL)
            signal.pause()
    part = torch.ones(1) * (rank + 1)
    dist.all_reduce(part)
    total += part
with open(f"{OUT}/result-{rank}", "w") as result:
    result.write(f"run {RUN}: {total.item():g}")
dist.destroy_process_group()
