"""The layouts on the CPU with gloo, and, marked `gpu`, with NCCL on a GPU that all ranks share: no bit differs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.recovery.launching import difference, launch

SCRIPT = Path(__file__).with_name("job_layouts.py")
FAULTS = {
    "ddp": ("1:1:forward", "0:2:backward", "3:3:updating"),
    "hsdp": ("1:1:forward", "0:2:backward", "2:3:updating", "3:3:between"),
    "fsdp": ("1:2:forward", "3:3:updating"),
}
MIRRORS = ("--rdzv-conf", "mirror_every=1")  # of a shard without a replica
SLOW = os.environ.get("CHECKPOINTLESS_SLOW_TESTS") == "1"
NCCL = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: NCCL is not verified here"),
]
ON_CPU = [("cpu", layout) for layout in (FAULTS if SLOW else ())]
ON_CUDA = [pytest.param("cuda", layout, marks=NCCL) for layout in FAULTS]


@pytest.mark.parametrize(("device", "layout"), [*ON_CPU, *ON_CUDA])
def test_a_lost_rank_changes_no_bit(device: str, layout: str, tmp_path: Path) -> None:
    planned = [f"{layout}:{fault}" for fault in FAULTS[layout]]
    options = MIRRORS if layout == "fsdp" else ()
    asked = {"ranks": 4, "script": SCRIPT, "options": options, "KINDS": layout, "DEVICE": device}
    whole = launch(tmp_path / "whole", **asked)
    assert whole.code == 0, whole.text
    ended = launch(tmp_path / "lost", ",".join(planned), **asked)
    assert ended.code == 0, ended.text
    died = {path.name for path in ended.out.glob("died-*")}
    assert died == {f"died-{fault.replace(':', '-')}" for fault in planned}
    assert {record["rung"] for record in ended.recoveries()} == {2 if layout == "fsdp" else 1}, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
