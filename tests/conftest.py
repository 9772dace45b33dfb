"""Fixtures that start real torchrun jobs and let no test leave a process or a run directory behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("CHECKPOINTLESS_HANG_SLACK", "60")  # many tests hold a worker up on purpose
# TCPStore looks up the name of each peer's address, on the server's only thread: a name server that lets a query fall
# would stall all of a test's agents for the resolver's 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
MARK = "CHECKPOINTLESS_TEST_JOB"
TIMEOUT_S = 240.0  # for hangs only: the machine may be loaded
PAUSE_S = 0.01
RUN_DIR_ROOTS = (Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones run when they are asked for."""
    if os.environ.get("CHECKPOINTLESS_SLOW_TESTS") != "1":
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(pytest.mark.skip(reason="slow; set CHECKPOINTLESS_SLOW_TESTS=1"))


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT_S) -> None:
    """Look again and again until the condition holds; for things that no event announces to a test."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(PAUSE_S)  # what is waited for needs the processor


@dataclass
class Finished:
    """A job that has ended."""

    code: int
    out: str
    err: str


@dataclass
class Job:
    """A running torchrun and everything that descends from it, found by a mark in the environment."""

    process: subprocess.Popen[str]
    mark: str
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def members(self) -> list[psutil.Process]:
        """All living processes of this job, torchrun among them."""
        return marked(self.mark)

    def finish(self, timeout: float = TIMEOUT_S) -> Finished:
        """Wait for the end of torchrun."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"torchrun did not end within {timeout} s.\n{out}\n{err}")
        return Finished(self.process.returncode, out, err)

    def read(self, name: str) -> list[str]:
        """Lines of a file that the script writes; empty while it does not exist."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def expect_lines(self, name: str, count: int) -> list[str]:
        """Wait until the script has written that many lines."""
        wait_until(
            lambda: len(self.read(name)) >= count or self.process.poll() is not None,
            f"{count} lines in {name}",
        )
        assert len(self.read(name)) >= count, f"torchrun ended: {self.finish()}"
        return self.read(name)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that have this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@dataclass
class Launcher:
    """Starts jobs in one folder, each with its own mark."""

    folder: Path
    jobs: list[Job] = field(default_factory=list)

    def script(self, text: str, name: str = "train.py") -> Path:
        """Write a script; its folder is where jobs run."""
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return path

    def start(
        self,
        *args: object,
        backend: str = "checkpointless",
        env: dict[str, str] | None = None,
        ranks: int = 2,
    ) -> Job:
        """Start torchrun with `ranks` workers; `args` are its further options, the script and the script's own."""
        mark = uuid.uuid4().hex
        options = ["--rdzv-backend", backend, "--nnodes", "1", "--nproc-per-node", str(ranks)]
        if backend == "c10d":
            options += ["--rdzv-endpoint", "localhost:0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *map(str, args)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        job = Job(process, mark, self.folder)
        self.jobs.append(job)
        return job

    def run(
        self,
        *args: object,
        backend: str = "checkpointless",
        env: dict[str, str] | None = None,
        ranks: int = 2,
    ) -> Finished:
        """Start a job and wait for its end."""
        return self.start(*args, backend=backend, env=env, ranks=ranks).finish()

    def leftovers(self) -> list[str]:
        """Processes and run directories of jobs whose torchrun has ended."""
        ended = [job for job in self.jobs if job.process.poll() is not None]
        processes = [f"process {p.pid}" for job in ended for p in job.members()]
        return processes + [f"directory {path}" for job in ended for path in run_dirs(job.pid)]

    def end(self) -> None:
        """Kill what still runs."""
        for job in self.jobs:
            if job.process.poll() is None:
                job.process.kill()
                job.process.communicate()


def run_dirs(pid: int) -> list[Path]:
    """Run directories of the agent with this process id."""
    return [path for root in RUN_DIR_ROOTS for path in root.glob(f"checkpointless-{pid}-*")]


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Launcher]:
    """Starts torchrun jobs; fails the test when one leaves a process or a run directory behind."""
    launcher = Launcher(tmp_path)
    try:
        yield launcher
    finally:
        launcher.end()
        try:
            wait_until(
                lambda: not launcher.leftovers(),
                "all processes and run directories of the jobs are gone",
                10.0,
            )
        finally:
            for job in launcher.jobs:
                for process in job.members():
                    process.kill()


@pytest.fixture(autouse=True)
def _no_leaked_children() -> Iterator[None]:
    """Fails a test that leaves a child process of pytest's own running."""
    before = set(psutil.Process().children())
    yield
    left = [child for child in set(psutil.Process().children()) - before if _counts(child)]
    assert not left, f"The test left child processes behind: {left}"


def _counts(child: psutil.Process) -> bool:
    """Not counted: what has ended, and multiprocessing's own helper, which lives as long as its process."""
    try:
        return child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
    except psutil.NoSuchProcess:
        return False
