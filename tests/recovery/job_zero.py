"""DDP with torch's ZeroRedundancyOptimizer, over all ranks or over half of them at a time; see phases.py."""

from __future__ import annotations

from typing import Any

import torch
from phases import Kind, batch, hybrid, join, loss_of, moment, net, run_job
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

join()


def zero(**options: Any) -> Kind:
    """Clipping, a scheduler, and a rank that can die before its update, or between that and the sending around."""
    model = DistributedDataParallel(net())
    params = list(model.parameters())
    groups = [{"params": params[:5]}, {"params": params[5:], "weight_decay": 0.1}]
    optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=1e-2, **options)
    optimizer.register_step_pre_hook(lambda *_: moment("updating"))
    optimizer.optim.register_step_post_hook(lambda *_: moment("updated"))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def step(number: int) -> Tensor:
        loss = loss_of(model, batch(number))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        moment("stepped")
        scheduler.step()
        optimizer.zero_grad()
        return loss.detach()

    def save(_: int) -> float:
        """What a script does to save the optimizer: one rank gets all parts."""
        optimizer.consolidate_state_dict(to=0)
        moment("consolidated")
        if optimizer.rank != 0:
            return 0.0
        kept = optimizer.state_dict()["state"].values()
        return float(sum(value.double().sum() for state in kept for value in state.values()))

    return Kind({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step, save)


run_job(
    {
        "whole": zero,
        "views": lambda: zero(parameters_as_bucket_view=True),
        "rows": lambda: zero(process_group=hybrid().get_group("shard")),
        "columns": lambda: zero(process_group=hybrid().get_group("replicate")),
    }
)
