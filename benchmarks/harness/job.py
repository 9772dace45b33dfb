"""Starts a training script under our launcher or plain torchrun, in a folder of its own, and ends all it
started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
from typing_extensions import Self

OURS, TORCHRUN = "checkpointless", "c10d"


class JobFailedError(RuntimeError):
    """Raised when a job that should have ended well did not, or did not come as far as it should in time."""


@dataclass(frozen=True)
class Plan:
    """One job to start.

    Attributes:
        backend: OURS or TORCHRUN, the rendezvous backend that torchrun is given.
        script: the training script.
        folder: an empty folder; becomes BENCH_DIR, holds torchrun.log, logs/ and recoveries.jsonl.
        ranks: number of workers, on all nodes together.
        steps: BENCH_STEPS.
        checkpoint_every: BENCH_CHECKPOINT_EVERY.
        max_restarts: torchrun's --max-restarts.
        arguments: arguments of the script.
        environment: variables beside those of this process.
        show: let the job write to this terminal instead of torchrun.log.
        nodes, spares: agents with ranks, and those that wait; more than one node in all needs harness.cluster.
        store: of OURS on several nodes, "c10d" (embedded, on the first node) or "etcd" (members on the first three).
    """

    backend: str
    script: Path
    folder: Path
    ranks: int
    steps: int = 0
    checkpoint_every: int = 0
    max_restarts: int = 3
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    show: bool = False
    nodes: int = 1
    spares: int = 0
    store: str = "c10d"

    def command(self) -> list[str]:
        """torchrun for all ranks on this machine."""
        endpoint = ["--rdzv-endpoint", "localhost:0"] if self.backend == TORCHRUN else []
        return self.torchrun(self.backend, *endpoint, "--nnodes", "1")

    def torchrun(self, backend: str, *options: str, logs: str = "logs") -> list[str]:
        """torchrun for the ranks of one node."""
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", backend, *options),
            *("--nproc-per-node", str(self.ranks // self.nodes), "--max-restarts", str(self.max_restarts)),
            *("--log-dir", str(self.folder / logs), str(self.script), *self.arguments),
        ]

    def variables(self) -> dict[str, str]:
        """The job's environment. TORCH_DISABLE_SHARE_RDZV_TCP_STORE lets plain torchrun on gloo come back
        from a worker's death at all (pytorch 135712, 167288): as shipped, restarted workers find stale
        addresses."""
        ours = {
            "BENCH_DIR": str(self.folder),
            "BENCH_STEPS": str(self.steps),
            "BENCH_CHECKPOINT_EVERY": str(self.checkpoint_every),
            "CHECKPOINTLESS_EVENTS": str(self.folder / "recoveries.jsonl"),
            "OMP_NUM_THREADS": "1",
        }
        if self.backend == TORCHRUN:
            ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return {**os.environ, **ours, **self.environment}


class Running(ABC):
    """A job that was started, on one node or several; as a context manager it leaves no process behind."""

    plan: Plan

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def running(self) -> bool: ...

    @abstractmethod
    def processes(self) -> list[psutil.Process]:
        """All launchers and everything below them; empty when the job has ended."""

    @abstractmethod
    def code(self, timeout: float) -> int:
        """Waits for the end and returns the exit code; JobFailedError when it does not come in time."""

    @abstractmethod
    def tail(self, lines: int = 30) -> str:
        """The end of what the launchers wrote."""

    def memory(self) -> int:
        """Bytes of memory of the whole job; what several processes share is counted once."""
        total = 0
        for process in self.processes():
            with ignore_gone():
                total += process.memory_full_info().pss
        return total

    def finish(self, timeout: float = 300) -> None:
        """Waits for the end and raises when the job failed."""
        code = self.code(timeout)
        if code:
            raise JobFailedError(f"{self.plan.script.name} ended with exit code {code}. {self.tail()}")

    def until(self, ready: Callable[[], bool], timeout: float = 120, pause: float = 0.01) -> None:
        """Polls until ready() is true; raises when the job ends or the time is over before."""
        end = time.monotonic() + timeout
        while not ready():
            if not self.running():
                raise JobFailedError(f"{self.plan.script.name} ended too early. {self.tail()}")
            if time.monotonic() > end:
                raise JobFailedError(
                    f"{self.plan.script.name} made no progress for {timeout:g} s. {self.tail()}"
                )
            time.sleep(pause)


class Job(Running):
    """A running job of one node."""

    def __init__(self, plan: Plan) -> None:
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.plan = plan
        self._log = None if plan.show else (plan.folder / "torchrun.log").open("w")
        self._process = subprocess.Popen(
            plan.command(),
            env=plan.variables(),
            stdout=self._log,
            stderr=subprocess.STDOUT if self._log else None,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = self.processes()
        for process in processes:
            with ignore_gone():
                process.kill()
        self._process.wait()
        if self._log:
            self._log.close()

    def running(self) -> bool:
        return self._process.poll() is None

    def processes(self) -> list[psutil.Process]:
        return below(self._process)

    def code(self, timeout: float) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise JobFailedError(
                f"{self.plan.script.name} did not end within {timeout:g} s. {self.tail()}"
            ) from error

    def tail(self, lines: int = 30) -> str:
        return end_of(Path(self._log.name), lines) if self._log else "Its output is above."


def end_of(log: Path, lines: int) -> str:
    return "\n".join([f"The end of {log}:", *log.read_text(errors="replace").splitlines()[-lines:]])


def below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all that it started; empty when it has ended."""
    if process.poll() is None:
        with ignore_gone():
            parent = psutil.Process(process.pid)
            return [parent, *parent.children(recursive=True)]
    return []


@contextmanager
def ignore_gone() -> Iterator[None]:
    """For calls on a process that may have ended by itself in the meantime."""
    try:
        yield
    except (psutil.NoSuchProcess, psutil.ZombieProcess, ProcessLookupError):
        return
