"""Starts real torchrun jobs and compares what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

JOB = Path(__file__).with_name("job.py")
LIMIT_S = 240.0


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    out: Path
    ranks: int
    code: int
    text: str

    def recoveries(self) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finals(self) -> list[dict[str, Any]]:
        return [self._final(rank) for rank in range(self.ranks)]

    def _final(self, rank: int) -> dict[str, Any]:
        path = self.out / f"final-{rank}.pt"
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return found

    def pids(self, rank: int) -> list[int]:
        lines = (self.out / f"steps-{rank}.log").read_text().splitlines()
        return list(dict.fromkeys(int(line.split()[0]) for line in lines))


def launch(
    out: Path,
    faults: str = "",
    ranks: int = 3,
    script: Path = JOB,
    options: tuple[str, ...] = (),
    backend: str = "checkpointless",
    launcher: tuple[str, ...] = ("-m", "torch.distributed.run"),
    **env: str,
) -> Ended:
    """Run the script under torchrun to its end. A job that hangs fails the test by its time limit."""
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        *launcher,
        "--rdzv-backend",
        backend,
        "--rdzv-endpoint",
        "localhost:0",
    ]
    command += [f"--nproc-per-node={ranks}", *options, str(script)]
    given = {
        **os.environ,
        "OUT": str(out),
        "FAULTS": faults,
        "OMP_NUM_THREADS": "1",
        "CHECKPOINTLESS_EVENTS": str(out / "events.jsonl"),
        **env,
    }
    done = subprocess.run(
        command,
        env=given,
        timeout=LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Ended(out, ranks, done.returncode, done.stdout)


def difference(left: Any, right: Any, path: str = "") -> str:
    """Where two results differ bit for bit; empty if they do not."""
    if type(left) is not type(right):
        return f"{path}: {type(left).__name__} and {type(right).__name__}"
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return "" if same else f"{path}: tensors differ"
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{path}: keys differ"
        found = (difference(left[key], right[key], f"{path}.{key}") for key in left)
    elif isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return f"{path}: lengths differ"
        found = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True)))
    else:
        return "" if left == right else f"{path}: {left} and {right}"
    return next(filter(None, found), "")
