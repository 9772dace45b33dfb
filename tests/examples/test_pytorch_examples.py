"""PyTorch's own examples of distributed training lose a worker and end as they do under plain torchrun, bit for bit.

They are not in this repository: see README.md beside this file.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.directory.etcd_server import free_ports
from tests.recovery.launching import difference

SOURCE = os.environ.get("CHECKPOINTLESS_PYTORCH_EXAMPLES", "")
SITE = Path(__file__).with_name("site")
HOME = Path(__file__).parents[2]
LIMIT_S = 180.0
PLAIN, OURS = "c10d", "checkpointless"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SOURCE, reason="CHECKPOINTLESS_PYTORCH_EXAMPLES names no checkout of pytorch/examples"
    ),
]


@dataclass(frozen=True)
class Example:
    """One script.

    Attributes:
        folder: below `distributed`.
        command: the script and its arguments.
        kill: "rank:step", the optimizer steps of this rank after which it is killed.
        result: a file that the script writes, if it writes one.
        needs: modules that it imports beside torch.
        nodes: agents on this machine; the two ranks are on the first, or one on each.
        exact: two runs under plain torchrun end with the same bits.
    """

    folder: str
    command: tuple[str, ...]
    kill: str
    result: str = ""
    needs: tuple[str, ...] = ()
    nodes: int = 1
    exact: bool = True


SMALL_GPT = (
    "trainer_config.max_epochs=3", "trainer_config.save_every=1", "trainer_config.batch_size=64",
    "trainer_config.data_loader_workers=1", "data_config.path=data/input.txt", "data_config.block_size=16",
    "data_config.truncate=0.005", "gpt_config.n_layer=2", "gpt_config.n_head=2", "gpt_config.n_embd=32",
)  # fmt: skip
EXAMPLES = {
    "DDP with snapshots": Example("ddp-tutorial-series", ("multigpu_torchrun.py", "4", "1"), "1:50", "snapshot.pt"),
    "DDP with snapshots, rank 0 lost": Example(
        "ddp-tutorial-series", ("multigpu_torchrun.py", "4", "1"), "0:50", "snapshot.pt"
    ),
    "DDP on two nodes": Example("ddp-tutorial-series", ("multinode.py", "4", "1"), "1:50", "snapshot.pt", nodes=2),
    "minGPT": Example("minGPT-ddp/mingpt", ("main.py", *SMALL_GPT), "1:50", "gpt_snapshot.pt", ("hydra", "boto3")),
    "DDP, one step": Example("ddp", ("example.py",), "1:1"),
    "tensor parallel": Example("tensor_parallelism", ("tensor_parallel_example.py",), "1:5"),
    "sequence parallel": Example("tensor_parallelism", ("sequence_parallel_example.py",), "0:5"),
    "FSDP2": Example("FSDP2", ("example.py",), "1:5", exact=False),
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """What a run has left."""

    folder: Path
    text: str

    def results(self, example: Example) -> dict[str, Any]:
        names = [f"out/final-{rank}.pt" for rank in range(2)] + ([example.result] if example.result else [])
        return {name: torch.load(self.folder / name, weights_only=True) for name in names}


def run(example: Example, backend: str, folder: Path, kill: str) -> Ended:
    """Run a copy of the example to its end; the agents share a folder, as nodes do."""
    shutil.copytree(Path(SOURCE) / "distributed" / example.folder, folder)
    (folder / "out").mkdir()
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    agents = [start(example, backend, folder, kill, endpoint, number) for number in range(example.nodes)]
    text = ""
    try:
        for agent in agents:
            text += agent.communicate(timeout=LIMIT_S)[0]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert [agent.returncode for agent in agents] == [0] * example.nodes, text
    assert (folder / "out" / "killed").exists() == bool(kill), text
    return Ended(folder, text)


def start(
    example: Example, backend: str, folder: Path, kill: str, endpoint: str, number: int
) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "OUT": str(folder / "out"),
        "KILL": kill,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{SITE}:{HOME}",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else plain torchrun does not come back from a death on gloo
        "CHECKPOINTLESS_IS_HOST": str(number == 0).lower(),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        backend,
        "--rdzv-endpoint",
        endpoint,
    ]
    command += [
        "--nnodes",
        str(example.nodes),
        "--nproc-per-node",
        str(2 // example.nodes),
        "--max-restarts=1",
    ]
    return subprocess.Popen(
        [*command, *example.command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_loses_a_worker_and_ends_as_under_plain_torchrun(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    for module in example.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"this example needs the module {module}")
    plain = run(example, PLAIN, tmp_path / "plain", example.kill)
    ours = run(example, OURS, tmp_path / "ours", example.kill)
    results = ours.results(example), plain.results(example)
    assert not example.exact or difference(*results) == "", ours.text
    assert ours.text.count("Resuming training") == plain.text.count("Resuming training")


@pytest.mark.parametrize("name", ["DDP with snapshots", "tensor parallel"])
def test_an_example_without_a_fault_ends_as_under_plain_torchrun(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    plain, ours = (run(example, backend, tmp_path / backend, "") for backend in (PLAIN, OURS))
    assert difference(ours.results(example), plain.results(example)) == "", ours.text
