"""What stands for the worker's session in tests of losses: a thread that hears of lost ranks and voids their groups."""

from __future__ import annotations

import queue
import threading
import time

import torch.distributed as dist

from checkpointless_elastic.groups import RebuildReport
from tests.groups.processes import LIMIT, Job, Worker


class Listener:
    """Hears words of the test on a thread of its own: ("lost", ranks), ("rebuild", generation) and ("go",).

    Attributes:
        aborted_at: when the last abort began.
        affected: the groups it voided.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.frozen = threading.Event()
        self.aborted_at = 0.0
        self.affected: list[str] = []
        self._generations: queue.Queue[int] = queue.Queue()
        self._go: queue.Queue[object] = queue.Queue()
        worker.host.waits_for_freeze = lambda: self.frozen.wait(0.5)
        worker.host.recover = lambda: self.rebuild() and None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            kind, *rest = self.worker.hear()
            if kind == "lost":
                self.aborted_at = time.monotonic()
                self.affected = self.worker.registry.abort(frozenset(rest[0]))
                self.frozen.set()
            elif kind == "rebuild":
                self._generations.put(rest[0])
            else:
                self._go.put(rest)

    def rebuild(self) -> RebuildReport:
        """Waits for the word and takes part in the rebuild."""
        generation = self._generations.get(timeout=LIMIT)
        self.worker.registry.report_use(self.worker.store, generation)
        self.worker.meet(f"reported use {generation}")
        report = self.worker.registry.rebuild(self.worker.store, generation)
        self.frozen.clear()
        return report

    def wait(self) -> list[object]:
        """Waits for the test's "go"."""
        found = self._go.get(timeout=LIMIT)
        assert isinstance(found, list)
        return found


def begin(worker: Worker) -> Listener:
    """An elastic default group and a listener; says that it is there."""
    worker.registry.install()
    dist.init_process_group("gloo", store=worker.store, rank=worker.rank, world_size=worker.size)
    return Listener(worker)


def lose(job: Job, *ranks: int) -> None:
    """Kills these ranks and tells the others."""
    for rank in ranks:
        job.kill(rank)
    survivors = [rank for rank in job.processes if rank not in ranks]
    job.tell(("lost", set(ranks)), *survivors)
