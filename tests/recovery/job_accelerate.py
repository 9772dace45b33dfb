"""A loop written with Hugging Face Accelerate: prepared model, optimizer, scheduler and loader, gradients accumulated.

Rank 1 dies at the calls that DIE names, separated by commas, before its backward. LOADER=processes: the loader has
worker processes that live on.
"""

from __future__ import annotations

import os
import signal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import checkpointless_elastic as ce

OUT, DIE = os.environ["OUT"], os.environ.get("DIE", "").split(",")
WORKERS = int(os.environ.get("LOADER") == "processes")

set_seed(3)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
rank = accelerator.process_index
samples = TensorDataset(torch.randn(72, 16, generator=torch.Generator().manual_seed(1)))
plain = DataLoader(samples, batch_size=8, shuffle=True, num_workers=WORKERS, persistent_workers=bool(WORKERS))
net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.GELU(), nn.Linear(32, 16))
adam = torch.optim.AdamW(net.parameters(), lr=1e-2)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 30)
model, optimizer, loader, scheduler = accelerator.prepare(net, adam, plain, cosine)
named = {"accelerator": accelerator} if not os.environ.get("UNNAMED") else {}
run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler, **named)


def die_once(call: int) -> None:
    if rank != 1 or str(call) not in DIE:
        return
    try:
        os.close(os.open(f"{OUT}/died-{call}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@run.replayable
def train_step(call: int, batch: torch.Tensor) -> torch.Tensor:
    with accelerator.accumulate(model):
        loss = (model(batch) - batch).square().mean()
        die_once(call)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss.detach()


losses = []
for epoch in run.epochs(3):
    for number, (batch,) in run.numbered(loader):
        loss = train_step(epoch * len(loader) + number, batch)
        losses.append(accelerator.gather(loss.reshape(1)).sum())
torch.save(
    {
        "model": accelerator.unwrap_model(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr": scheduler.get_last_lr(),
        "loss": losses[-1],
        "rng": torch.get_rng_state(),
    },
    f"{OUT}/final-{rank}.pt",
)
accelerator.end_training()
