"""Trains a byte-level GPT on the source of Python's standard library, data parallel, and survives lost
workers.

    torchrun --rdzv-backend checkpointless --nproc-per-node 4 scripts/recipes/gpt.py --out /tmp/gpt

What makes it survive is marked with "<-". The rest is an ordinary training script, and under plain torchrun
it runs as well, unprotected. Each rank leaves a line per step in steps-<rank>.log and what it ends with in
final-<rank>.pt."""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpointless_elastic as ce

CONTEXT, WIDTH, HEADS, LAYERS, DROPOUT = 64, 256, 4, 4, 0.1


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, both with a residual path and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            *heads, is_causal=True, dropout_p=DROPOUT if self.training else 0.0
        )
        x = x + self.drop(self.proj(mixed.transpose(1, 2).reshape(rows, length, WIDTH)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Predicts the next byte; returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(
            nn.Dropout(DROPOUT), *(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        )
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        seen, wanted = text[:, :-1], text[:, 1:]
        logits = self.head(self.blocks(self.tokens(seen) + self.places.weight))
        return functional.cross_entropy(logits.reshape(-1, 256), wanted.reshape(-1))


def standard_library() -> Tensor:
    """The bytes of the modules at the top of the standard library, in order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def sample(text: Tensor, rows: int) -> Tensor:
    """Random pieces of the text, drawn from torch's generator, which a replacement gets back as it was."""
    starts = torch.randint(len(text) - CONTEXT, (rows, 1))
    return text[starts + torch.arange(CONTEXT + 1)].long()


def recoveries() -> int:
    """How often the job has recovered so far, from the file of events, where one is named."""
    events = Path(os.environ.get("CHECKPOINTLESS_EVENTS", ""))
    return len(events.read_text().splitlines()) if events.is_file() else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="pieces of text per rank and step")
    parser.add_argument("--evaluate-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("gpt-out"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    text = standard_library()
    train, held_out = text.tensor_split([len(text) * 19 // 20])
    torch.manual_seed(options.seed)
    model = DistributedDataParallel(GPT())
    torch.manual_seed(
        options.seed * dist.get_world_size() + rank + 1
    )  # other text and other masks on each rank
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = 10
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / options.steps)),
    )
    run = ce.Run(model=model, optimizer=optimizer, scheduler=scheduler)  # <- what must survive

    @run.replayable  # <- what is done again when a peer is lost
    def train_step() -> float:
        loss = model(sample(train, options.batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return float(loss.detach())

    @run.replayable  # <- it has a collective, so it is done again as well
    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        loss = model.module(sample(held_out, 2 * options.batch))
        model.train()
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()

    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / f"steps-{rank}.log").open("a")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), disable=rank != 0) as progress:
        bar, held_out_loss = progress.add_task("training", total=options.steps, figures=""), math.nan
        for step in run.steps(options.steps):  # <- where a replacement resumes
            loss = train_step()
            print(time.time_ns(), step, os.getpid(), file=log, flush=True)
            if (step + 1) % options.evaluate_every == 0:
                held_out_loss = evaluate()
            figures = f"loss {loss:.3f}, held out {held_out_loss:.3f}, {recoveries()} recoveries"
            progress.update(bar, completed=step + 1, figures=figures)
    state = {
        "model": model.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, options.out / f"final-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
