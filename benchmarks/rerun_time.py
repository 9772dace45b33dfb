"""How long until an unprotected script runs again? Rung 3 in the surviving processes, and in new ones.

One round is a job of --ranks workers that train a small model with DDP; rank 1 is killed by SIGKILL in a step. What
is measured is the time from the kill until the survivors come to the first line of the script again, the fastest and
the slowest of them, and until the rank that was killed does. The two settings of `unprotected` alternate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from harness.report import write_json

from checkpointless_elastic.observe.machine import provenance

SCRIPT = """
import os, time
first_line = time.time()
import signal, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
with open(f"begun.{rank}.{count}", "w") as file:
    file.write(f"{first_line} {os.getpid()}")
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(256, 256))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(20):
    if (rank, count, step) == ("1", "0", 10):
        dist.barrier()
        with open("killed", "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    elif (count, step) == ("0", 10):
        dist.barrier()
    model(torch.randn(32, 256)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
"""


def round_of(mode: str, ranks: int) -> dict[str, float]:
    """Seconds, and how many survivors kept their process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.py").write_text(SCRIPT)
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "checkpointless"]
        command += ["--nnodes", "1", "--nproc-per-node", str(ranks), "--max-restarts", "1"]
        command += ["--rdzv-conf", f"unprotected={mode}", "train.py"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
        killed = float((folder / "killed").read_text())
        first, second = (
            [(folder / f"begun.{rank}.{count}").read_text().split() for rank in range(ranks)]
            for count in (0, 1)
        )
    times = [float(text) - killed for text, _ in second]
    survivors = [seconds for rank, seconds in enumerate(times) if rank != 1]
    kept = sum(before == after for (_, before), (_, after) in zip(first, second, strict=True))
    return {"first": min(survivors), "last": max(survivors), "replacement": times[1], "kept": kept}


def main() -> int:
    """Alternate both modes; print the medians, and write everything if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"rerun": [], "restart": []}
    for _ in range(options.repeats):
        for mode, found in rounds.items():
            found.append(round_of(mode, options.ranks))
            print(mode, {name: round(value, 3) for name, value in found[-1].items()}, flush=True)
    for mode, found in rounds.items():
        print(mode, {name: round(median(one[name] for one in found), 3) for name in found[0]})
    if options.json:
        write_json(options.json, {"ranks": options.ranks, "rounds": rounds, **provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
