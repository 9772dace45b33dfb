"""Strikes the processes of our own job from outside, at the steps that a schedule says."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence

import psutil
from jobs.faults import CLOCK, NODE_KINDS, OUTSIDE_KINDS, STORE_KINDS, Fault, claim, marker

from checkpointless_elastic.chaos.processes import Process
from checkpointless_elastic.chaos.strikes import KINDS
from harness.job import JobFailedError, Running, ignore_gone
from harness.steps import newest_process, progress

PAUSE = 0.002


class Clock(threading.Thread):
    """Strikes with one fault after the other, as soon as the job has come to their step."""

    def __init__(self, job: Running, faults: Sequence[Fault]) -> None:
        super().__init__(daemon=True)
        self._job = job
        others = (*NODE_KINDS, *STORE_KINDS)
        self._faults = [fault for fault in faults if fault.moment == CLOCK and fault.kind not in others]

    def run(self) -> None:
        folder, ranks = self._job.plan.folder, self._job.plan.ranks
        for fault in self._faults:
            try:
                self._job.until(lambda step=fault.step: progress(folder, ranks) >= step, timeout=600)
            except JobFailedError:
                return  # the main thread sees the same and reports it
            time.sleep(fault.delay)
            if fault.kind in OUTSIDE_KINDS:  # the job may go on meanwhile, and come to the next fault
                threading.Thread(target=self._hold, args=(fault,), daemon=True).start()
                continue
            for rank in fault.ranks:
                self._strike(fault, rank)

    def _strike(self, fault: Fault, rank: int) -> None:
        """Waits for a living process of the rank, which may be lost to another fault just now, and kills it."""
        folder = self._job.plan.folder
        number = signal.SIGSEGV if fault.kind == "SIGSEGV" else signal.SIGKILL
        struck = False
        while not struck and self._job.running():
            with ignore_gone():
                pid = newest_process(folder, rank)
                struck = pid is not None and self._kill(pid, number)
            if struck:
                claim(marker(folder, fault.number, rank))
            time.sleep(0 if struck else PAUSE)

    def _kill(self, pid: int, number: int) -> bool:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.send_signal(number)
        return True

    def _hold(self, fault: Fault) -> None:
        """As `_strike`, with what lasts for a while."""
        (rank,) = fault.ranks
        while self._job.running():
            with ignore_gone(), Process(self._pid(fault)) as process:
                if not process.ended(0):
                    claim(marker(self._job.plan.folder, fault.number, rank))
                    KINDS[fault.kind].strike(process, fault.lasts)
                    return
            time.sleep(PAUSE)

    def _pid(self, fault: Fault) -> int:
        """The process to strike now; ProcessLookupError if there is none."""
        if KINDS[fault.kind].agent:
            pid = next((process.pid for process in self._job.processes()), None)
        else:
            pid = newest_process(self._job.plan.folder, fault.ranks[0])
        if pid is None:
            raise ProcessLookupError
        return pid
