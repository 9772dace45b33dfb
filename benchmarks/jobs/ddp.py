"""Data parallel training, of 5 million parameters by default, protected by a Run, with a local checkpoint for
plain torchrun."""

from __future__ import annotations

import os
import time

import accelerator
import torch
import torch.distributed as dist
from steplog import CHECKPOINT_EVERY, FOLDER, STEPS, StepLog, save_whole, write_final
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

BATCH = int(os.environ.get("BENCH_BATCH", "16"))
DEVICE_S = float(os.environ.get("BENCH_DEVICE_MS", "0")) / 1e3  # a wait in place of an accelerator's work
WIDTH = int(os.environ.get("BENCH_WIDTH", "1450"))  # 5 million parameters


def build_model() -> nn.Module:
    layers: list[nn.Module] = []
    for width in (256, WIDTH, WIDTH):
        layers += [nn.Linear(width, WIDTH), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 256))


def load_checkpoint(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 without a checkpoint, or where the state comes from the peers."""
    shared, own = FOLDER / "checkpoint.pt", FOLDER / f"checkpoint-{rank}.pt"
    if ce.is_replacement() or not shared.exists():
        return 0
    state = torch.load(shared, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(torch.load(own, weights_only=True)[state["step"]])
    return int(state["step"])


def save_checkpoint(rank: int, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each rank keeps its RNG under the step's number: a kill between two files must not mix two steps."""
    own = FOLDER / f"checkpoint-{rank}.pt"
    kept = torch.load(own, weights_only=True) if own.exists() else {}
    save_whole({**kept, step: torch.get_rng_state()}, own)
    dist.barrier()
    if rank == 0:
        save_whole(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
            FOLDER / "checkpoint.pt",
        )


def main() -> None:
    device = accelerator.join()
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = DistributedDataParallel(build_model().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    first = load_checkpoint(rank, model.module, optimizer)
    run = ce.Run(model=model, optimizer=optimizer)
    log = StepLog(rank)

    @run.replayable
    def train_step(step: int) -> None:
        batch = torch.randn(BATCH, 256, device=device)
        loss = nn.functional.mse_loss(model(batch), batch)
        time.sleep(DEVICE_S)
        loss.backward()
        optimizer.step()
        log.committed(step)
        optimizer.zero_grad()

    for done in run.steps(STEPS - first):
        step = first + done
        train_step(step)
        if CHECKPOINT_EVERY and (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(rank, step + 1, model.module, optimizer)
    state = {
        "model": model.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": accelerator.rng_states(),
    }
    write_final(rank, state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
