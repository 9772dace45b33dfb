"""HSDP jobs that lose workers in every kind of step: the result is that of a run without a fault, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch

SCRIPT = Path(__file__).with_name("job_sharded.py")
MODELS = Path(__file__).with_name("job_models.py")
KINDS = {
    "accumulate": ("1:2:forward", "0:2:micro0", "2:3:evaluated", "0:4:between:late", "3:4:evaluate"),
    "recompute": ("1:1:forward", "0:2:backward", "2:3:updating", "3:3:between"),
    "frozen": ("0:2:backward", "2:3:between steps", "1:4:updating"),
    "adversary": ("1:1:backward", "2:3:between steps"),
    "compiled": ("0:2:backward",),
    "muon": ("1:2:forward", "0:3:updating", "2:4:stepped"),
    "checking": ("1:1:forward", "0:2:backward", "2:3:between batches"),
    "experts": ("3:1:forward", "0:2:backward", "2:3:updating"),
}
ALWAYS = ("accumulate", "muon", "experts")  # the others are slow, or like these
FULL = ("1:1:forward", "0:2:backward", "3:3:updating", "2:4:computed")
MODELS_OF_OTHERS = ("llama", "mixtral", "lora_ddp", "lora_hsdp")
SLOW = os.environ.get("CHECKPOINTLESS_SLOW_TESTS") == "1"


def check(faults: dict[str, tuple[str, ...]], script: Path, folder: Path) -> Ended:
    """Both runs in one go; each rank of each fault must have died, and nothing but rung 1 been taken."""
    kinds = ",".join(faults)
    planned = [f"{kind}:{fault}" for kind, listed in faults.items() for fault in listed]
    whole = launch(folder / "whole", ranks=4, script=script, KINDS=kinds)
    assert whole.code == 0, whole.text
    ended = launch(folder / "lost", ",".join(planned), ranks=4, script=script, KINDS=kinds)
    assert ended.code == 0, ended.text
    died = {path.name for path in ended.out.glob("died-*")}
    late = {fault for fault in planned if fault.endswith(":late")}
    assert died == {f"died-{fault.replace(':', '-')}" for fault in planned if fault not in late}
    assert {record["rung"] for record in ended.recoveries()} == {1}, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), whole.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == "", ended.text
    return ended


def test_a_lost_rank_of_a_sharded_job_changes_no_bit(tmp_path: Path) -> None:
    check({kind: faults for kind, faults in KINDS.items() if SLOW or kind in ALWAYS}, SCRIPT, tmp_path)


@pytest.mark.slow
def test_a_lost_rank_of_a_job_with_models_of_transformers_changes_no_bit(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    check(dict.fromkeys(MODELS_OF_OTHERS, FULL), MODELS, tmp_path)
