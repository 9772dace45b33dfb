"""A job of several nodes on this machine: a torchrun for each, and the command that looks at it from outside."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import torch

from checkpointless_elastic.command.cli import main
from tests.recovery.launching import difference

JOB = Path(__file__).with_name("job.py")
STEPS = 300
TOKEN = "a token of the tests of the command"
WAIT_S = 90.0


class Done(NamedTuple):
    """What the command has written, and its exit code."""

    code: int
    out: str
    err: str


class Nodes:
    """``endpoint``: of the store; ``nnodes``: as torchrun takes it. One worker on each node."""

    def __init__(self, folder: Path, backend: str, endpoint: str, nnodes: str = "2:3") -> None:
        self.folder = folder
        self.options = ["--rdzv-backend", backend, "--rdzv-endpoint", endpoint, "--rdzv-id", "job"]
        self._nnodes = nnodes
        self.launchers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for launcher in self.launchers:
            launcher.send_signal(signal.SIGCONT)
            launcher.kill()
            launcher.wait()

    def start(self, script: Path = JOB, conf: str = "heartbeat=0.5,heartbeat_misses=10") -> None:
        """One more node."""
        launcher = [sys.executable, "-m", "torch.distributed.run", *self.options]
        launcher += ["--nnodes", self._nnodes, "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
        launcher += ["--rdzv-conf", conf, str(script)]
        given = {"OUT": str(self.folder), "STEPS": str(STEPS), "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"}
        given |= {
            "CHECKPOINTLESS_EVENTS": str(self.folder / "events.jsonl"),
            "CHECKPOINTLESS_JOB_TOKEN": TOKEN,
        }
        with (self.folder / f"node-{len(self.launchers)}.log").open("wb") as log:
            process = subprocess.Popen(launcher, env={**os.environ, **given}, stdout=log, stderr=log)
        self.launchers.append(process)

    def command(self, *arguments: str, token: str = TOKEN) -> Done:
        """`checkpointless` with the job's options, in this process, which has loaded torch already."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setenv("CHECKPOINTLESS_JOB_TOKEN", token)
            patch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
            code = main([*arguments, *self.options])
        return Done(code, out.getvalue(), err.getvalue())

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json")
        assert done.code == 0, done.err + self.logs()
        found: dict[str, Any] = json.loads(done.out)
        return found

    def number(self, agent: str) -> int:
        """Of the node whose agent has this name, in the order of their start."""
        pids = [f"-{launcher.pid}-" for launcher in self.launchers]
        return next(number for number, pid in enumerate(pids) if pid in agent)

    def steps(self, rank: int) -> list[tuple[int, int]]:
        """Process id and step of each committed step."""
        path = self.folder / f"steps-{rank}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), int(step)) for pid, step in map(str.split, lines)]

    def expect_step(self, step: int) -> None:
        """Wait until both ranks have committed it; looks now and then, since the job needs the processors."""
        end = time.monotonic() + WAIT_S
        while not all(any(done >= step for _, done in self.steps(rank)) for rank in (0, 1)):
            assert time.monotonic() < end, f"no step {step}: {self.logs()}"
            time.sleep(0.05)

    def go_on(self) -> None:
        """Both ranks commit more steps than they have now."""
        self.expect_step(1 + max(step for rank in (0, 1) for _, step in self.steps(rank)))

    def store_host(self) -> int:
        """The node in whose agent the store lives."""
        logs = [path.read_text() for path in sorted(self.folder.glob("node-*.log"))]
        return next(number for number, log in enumerate(logs) if "hosts the rendezvous store" in log)

    def hurry(self) -> None:
        (self.folder / "hurry").touch()

    def codes(self, *numbers: int) -> list[int]:
        """Exit codes of these nodes, when they have ended."""
        try:
            return [self.launchers[number].wait(WAIT_S) for number in numbers]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.logs()) from error

    def causes(self) -> list[str]:
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["cause"] for line in lines]

    def finals(self) -> list[Any]:
        paths = [self.folder / f"final-{rank}.pt" for rank in (0, 1)]
        return [torch.load(path, weights_only=True) for path in paths]

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("node-*.log")))


def expect_equal(job: Nodes, oracle: Nodes) -> None:
    """The same parameters, optimizer state and random numbers, bit for bit."""
    for rank, (mine, theirs) in enumerate(zip(job.finals(), oracle.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == ""
