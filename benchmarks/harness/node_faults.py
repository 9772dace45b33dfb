"""Does to the nodes of a running job what a schedule says, and brings them back, so that there is a spare again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

from jobs.faults import NODE_KINDS, STORE_KINDS, Fault, claim, hold, marker

from harness import etcd
from harness.cluster import Cluster, Node
from harness.job import JobFailedError
from harness.steps import interruption, progress, read_logs

PAUSES = (
    0.3,
    6.0,
)  # seconds that a paused agent stands still: shorter and longer than a lost one is waited for
MEMBER_AWAY = (0.5, 5.0)  # seconds that a member of etcd is gone
LEEWAY = 3  # steps that the job may do beyond that of the next fault
PATIENCE = 60.0  # seconds that a fault waits for a spare, and a struck node for the job to go on
FENCED = 15.0  # seconds that an agent has, once it is back, to see that it is no longer needed and to end


class NodeFaults(threading.Thread):
    """One fault after the other, each as soon as the job has come to its step and has a spare.

    Meanwhile the job is held up a few steps further on: it must not end before its faults have struck.

    Attributes:
        error: what went wrong in this thread; to be raised by the one that waits for the job.
    """

    def __init__(self, job: Cluster, faults: Sequence[Fault], seed: int, patience: float = PATIENCE) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._job = job
        self._folder, self._ranks = job.plan.folder, job.plan.ranks
        self._faults = [fault for fault in faults if fault.kind in (*NODE_KINDS, *STORE_KINDS)]
        self._seed, self._patience = seed, patience
        self._hold_before(self._faults)

    def run(self) -> None:
        try:
            for index, fault in enumerate(self._faults):
                self._come_to(fault)
                self._wait(self._has_spare, self._patience)
                self._hold_before(self._faults[index + 1 :])
                time.sleep(fault.delay)
                self._strike(fault, random.Random(f"node {self._seed} {fault.number}"))
        except Exception as error:
            self.error = (
                error if self._job.running() else None
            )  # else the main thread sees the end, and reports it
        finally:
            hold(self._folder, None)

    def _come_to(self, fault: Fault) -> None:
        self._job.until(lambda: self._progress() >= fault.step, timeout=600)

    def _hold_before(self, faults: Sequence[Fault]) -> None:
        """So that the job does not run past the next of them; it can always do some steps."""
        step = max(faults[0].step, self._progress()) + LEEWAY if faults else None
        hold(self._folder, step)

    def _progress(self) -> int:
        return progress(self._folder, self._ranks)

    def _has_spare(self) -> bool:
        return any(node.is_warm for node in self._job.spares())

    def _wait(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Whether it became so while the job ran and the time was not over."""
        end = time.monotonic() + seconds
        while self._job.running() and time.monotonic() < end:
            if ready():
                return True
            time.sleep(0.02)
        return False

    def _choose(self, draw: random.Random) -> Node:
        """A node with ranks, once all ranks are somewhere; not that of a store which has no other member."""
        self._wait(lambda: len(self._job.placement()) == self._ranks, PATIENCE)
        places = self._job.placement().values()
        numbers = sorted({node.number for node in places if node.counts and not self._job.holds_store(node)})
        if not numbers:
            raise JobFailedError(f"For {PATIENCE:g} s no node that may be struck had ranks.")
        return self._job.nodes[draw.choice(numbers)]

    def _strike_store(self, fault: Fault, draw: random.Random) -> None:
        """Nobody is lost; the ranks of its node stand for the fault, or rank 0 where it has none."""
        node = self._job.nodes[draw.randrange(etcd.MEMBERS)]
        print(f"    {fault.kind}: {node}", flush=True)
        self._job.kill_member(node.number)
        struck_ns = time.time_ns()
        for rank in self._job.ranks_of(node) or [0]:
            claim(marker(self._folder, fault.number, rank))
        time.sleep(draw.uniform(*MEMBER_AWAY))
        self._job.start_member_again(node.number)
        self._wait(lambda: self._goes_on(struck_ns), self._patience)

    def _strike(self, fault: Fault, draw: random.Random) -> None:
        if fault.kind in STORE_KINDS:
            self._strike_store(fault, draw)
            return
        node = self._choose(draw)
        lost = self._job.ranks_of(node)
        print(f"    {fault.kind}: {node}", flush=True)
        {
            "power off": self._job.power_off,
            "cut": self._job.cut,
            "paused agent": self._job.pause,
            "killed agent": self._job.kill_agent,
        }[fault.kind](node)
        struck_ns = time.time_ns()
        for rank in lost:
            claim(marker(self._folder, fault.number, rank))
        if fault.kind == "paused agent":
            time.sleep(draw.uniform(*PAUSES))
            self._job.resume(node)
        elif fault.kind == "killed agent":
            self._job.start_again(node)  # at once, as a supervisor would
        self._wait(lambda: self._goes_on(struck_ns), self._patience)
        self._bring_back(fault, node, lost, draw)

    def _goes_on(self, struck_ns: int) -> bool:
        return interruption(read_logs(self._folder, self._ranks), struck_ns) is not None

    def _bring_back(self, fault: Fault, node: Node, lost: Sequence[int], draw: random.Random) -> None:
        """A fresh agent, unless the old one has kept its ranks."""
        if not self._job.running() or fault.kind == "killed agent":
            return
        if fault.kind == "paused agent" and self._kept(node, lost):
            node.struck = False
            return
        healed = fault.kind == "cut" and draw.random() < 0.5
        if healed:
            node.host.heal()  # what still runs there must find itself fenced
        may_end = healed or fault.kind == "paused agent"
        if may_end and self._wait(lambda: node.agent.poll() is not None, FENCED):
            self._job.start_again(node)
        else:
            self._job.reboot(node)

    def _kept(self, node: Node, lost: Sequence[int]) -> bool:
        return node.agent.poll() is None and set(lost) <= set(self._job.ranks_of(node))
