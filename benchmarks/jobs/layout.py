"""Training of 5 million parameters in the layout that BENCH_LAYOUT names (jobs/layouts.py), protected by a Run, with
a local checkpoint of each rank's part for plain torchrun, and for layouts that only a checkpoint can bring back."""

from __future__ import annotations

import os
from pathlib import Path

import accelerator
import layouts
import torch
import torch.distributed as dist
from steplog import CHECKPOINT_EVERY, FOLDER, STEPS, StepLog, local_state, save_whole, write_final
from torch import Tensor
from torch.distributed.tensor import DTensor

import checkpointless_elastic as ce

LAYOUT = os.environ.get("BENCH_LAYOUT", "hsdp")
BATCH = int(os.environ.get("BENCH_BATCH", "16"))
WIDTH = int(os.environ.get("BENCH_WIDTH", "785"))  # 5 million parameters
BLOCKS = 2  # FSDP2 costs processor time per block, which 8 ranks on 2 cores feel


class Checkpoint:
    """Each rank writes what it holds to a file of its own, and keeps the one before: a kill between the files of two
    ranks must not mix two steps."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._path: Path = FOLDER / f"checkpoint-{dist.get_rank()}.pt"
        self._model, self._optimizer = model, optimizer

    def save(self, step: int) -> None:
        kept = self._read()
        state = {
            "model": local_state(self._model),
            "optimizer": local_state(self._optimizer),
            "rng": torch.get_rng_state(),
        }
        newest = {max(kept): kept[max(kept)]} if kept else {}
        save_whole({**newest, step: state}, self._path)

    def load(self) -> int:
        """The step to go on with; 0 without a checkpoint, or where the state comes from the peers."""
        kept = self._read()
        newest = torch.tensor(max(kept, default=0))
        dist.all_reduce(newest, dist.ReduceOp.MIN)
        step = int(newest)
        if ce.is_replacement() or step == 0:
            return 0
        state = kept[step]
        with torch.no_grad():
            here = local_state(self._model)
            assert isinstance(here, dict)
            for key, tensor in here.items():
                tensor.copy_(state["model"][key])
        self._optimizer.load_state_dict(self._spread(state["optimizer"]))
        torch.set_rng_state(state["rng"])
        return step

    def _read(self) -> dict[int, dict[str, object]]:
        return torch.load(self._path, weights_only=True) if self._path.exists() else {}

    def _spread(self, state: dict[str, dict[int, dict[str, Tensor]]]) -> dict[str, object]:
        """The optimizer's tensors as its parameters are: parts of DTensors where those are."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        return {
            **state,
            "state": {
                number: {name: _like(value, params[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            },
        }


def _like(value: Tensor, param: Tensor) -> Tensor:
    if not isinstance(param, DTensor) or value.dim() == 0:
        return value
    where = (param.device_mesh, param.placements)
    return DTensor.from_local(value, *where, run_check=False, shape=param.shape, stride=param.stride())


def main() -> None:
    accelerator.join()
    parallel = layouts.build(LAYOUT, WIDTH, BLOCKS)
    model = parallel.model
    optimizer = parallel.optimizer(torch.optim.AdamW, model.parameters(), lr=1e-4)
    checkpoint = Checkpoint(model, getattr(optimizer, "optim", optimizer))  # of ZeRO this rank's part
    first = checkpoint.load()
    run = parallel.protect(optimizer=optimizer)
    log = StepLog(dist.get_rank())

    @run.replayable
    def train_step(step: int) -> None:
        parallel.compute(parallel.batch(step, BATCH))
        optimizer.step()
        optimizer.zero_grad()

    for done in run.steps(STEPS - first):
        step = first + done
        train_step(step)
        log.committed(step)
        if CHECKPOINT_EVERY and (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint.save(step + 1)
    state = {
        "model": local_state(model),
        "optimizer": local_state(optimizer),
        "rng": accelerator.rng_states(),
    }
    write_final(dist.get_rank(), state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
