"""What a job's processes are and what they make: recorded while it runs, looked for when it has ended."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import marked

SHM = Path("/dev/shm")
NOT_OURS = ("torchinductor_", "torchelastic_")
"""Of torch: its compiler's cache, which is kept on purpose, and torchrun's default log directory."""


@dataclass
class Traces:
    """All traces of the processes with one mark in their environment; `tmp` is their TMPDIR, and nobody else's.

    Other jobs may run on the machine: something in /dev/shm counts if a process of this job had it mapped, or if its
    name has the number of one.
    """

    mark: str
    tmp: Path
    processes: set[psutil.Process] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    before: set[str] = field(default_factory=lambda: {path.name for path in SHM.iterdir()})

    def look(self) -> None:
        """Record what is there now; children too that have lost the mark or their parent."""
        found = set(marked(self.mark))
        for process in list(found | self.processes):
            with suppress(psutil.NoSuchProcess):
                found |= set(process.children(recursive=True))
        self.processes |= found
        for process in found:
            self.shared |= _in_shm(process.pid)

    def left(self) -> list[str]:
        """One line for each thing that is still there."""
        alive = {process for process in self.processes if _is_alive(process)} | set(marked(self.mark))
        files = [
            path for path in SHM.iterdir() if path.name not in self.before and self._is_of_job(path.name)
        ]
        files += [path for path in self.tmp.iterdir() if not path.name.startswith(NOT_OURS)]
        return (
            [f"process {process}" for process in alive] + [f"file {path}" for path in files] + self._sockets()
        )

    def _is_of_job(self, name: str) -> bool:
        numbers = {int(number) for number in re.findall(r"\d+", name)}
        return name in self.shared or bool(numbers & {process.pid for process in self.processes})

    def _sockets(self) -> list[str]:
        """Unix sockets, abstract ones (@) too, with a path of this job."""
        names = [line.split(maxsplit=7)[7:] for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        paths = [name[0] for name in names if name]
        places = (str(self.tmp), *(f"{SHM}/{name}" for name in self.shared))
        pids = {str(process.pid) for process in self.processes}
        return [
            f"socket {path}"
            for path in paths
            if path.startswith(places) or (path[0] == "@" and pids & set(re.findall(r"\d+", path)))
        ]


def _in_shm(pid: int) -> set[str]:
    """Names right under /dev/shm of what a process has mapped."""
    with suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text()
        return {path.split("/")[0] for path in re.findall(rf"{SHM}/(\S+)$", maps, re.MULTILINE)}
    return set()


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
