"""This node's workers as the control plane commands them, and the verdict that the agent waits for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from signal import SIGKILL, SIGTERM, Signals

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from checkpointless_elastic.agent.context import Child, ForkedContext
from checkpointless_elastic.agent.runtime import ControlPlane, EventLoop
from checkpointless_elastic.agent.servers import ForkServers
from checkpointless_elastic.protocol.between import RunAgain
from checkpointless_elastic.protocol.messages import Afresh, Again, Unwind, Unwound

__all__ = ["UNWIND_LIMIT_S", "LocalWorkforce", "Verdict", "VerdictKind"]

logger = logging.getLogger(__name__)

UNWIND_LIMIT_S = 5.0
"""How long a worker may take to leave the script and clear up, before it is killed and forked anew."""


class VerdictKind(Enum):
    """How the present set of workers ends."""

    RESTART = "restart"
    GAVE_WAY = "gave way"  # this node's seat is another's
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """The control plane's last word on the present set of workers.

    Attributes:
        ranks: with FAILED the ranks to name, the root cause first.
    """

    kind: VerdictKind
    ranks: tuple[int, ...] = ()


class LocalWorkforce:
    """Implements `Workforce` for the control plane and `Witness` for the context.

    Global rank = `base` + local rank. Orders that come after the verdict, or while the job is being stopped, change
    nothing: a control plane may send them before it has heard of the end. `unwind_limit`: seconds in which a worker
    leaves the script in rung 3; 0: all workers are forked anew then.
    """

    def __init__(
        self,
        loop: EventLoop,
        servers: ForkServers,
        control: ControlPlane,
        run_dir: str,
        patience: float,
        unwind_limit: float = 0.0,
    ) -> None:
        self.run_dir = run_dir
        self.ranks: list[int] = []
        self.verdict: Verdict | None = None
        self.base = 0
        self._loop = loop
        self._servers = servers
        self._control = control
        self._patience = patience
        self._unwind_limit = unwind_limit
        self._context: ForkedContext | None = None
        self._leaving: VerdictKind | None = None  # the verdict once all workers have ended
        self._reason = ""
        self._withdrawn = ""
        self._bad: list[int] = []  # ranks that had failed when the job did; others are stopped then
        self._guilty: dict[int, Child] = {}  # of the ranks that are to blame, those that had failed then

    # ---- for the agent ------------------------------

    def assign(self, context: ForkedContext, ranks: list[int]) -> None:
        """A new set of workers is about to start."""
        self._context, self.ranks, self.base = context, ranks, ranks[0]
        self.verdict, self._leaving = None, None

    def wait(self) -> Verdict:
        """Serve everything until the control plane has decided how this set of workers ends."""
        self._loop.run(lambda: self.verdict is not None)
        verdict = self.verdict
        assert verdict is not None
        if not self.ended:
            self.verdict, self._leaving = None, None
            self.ranks = []  # those of this set do not count any more, however they ended
        return verdict

    def next_children(self) -> dict[int, Child]:
        """By local rank, for a new set of workers: those that run the script again, others that are to be forked."""
        if self._context is None:
            return {}
        return {rank: child.next() for rank, child in self._context.children.items()}

    def run_again(self, child: Child, again: Again) -> bool:
        """Tell a worker that is out of the script to run it again; False: it is not connected."""
        return self._control.tell(self.base + child.local_rank, again)

    def environment(self, child: Child) -> Mapping[str, str]:
        """Variables through which a worker finds the control plane; none if that serves no workers."""
        if not self._control.serves_workers:
            return {}
        return {
            "CHECKPOINTLESS_SOCKET": f"{self.run_dir}/agent.sock",
            "CHECKPOINTLESS_TOKEN": child.token,
            "CHECKPOINTLESS_INCARNATION": str(child.incarnation),
            "CHECKPOINTLESS_RUN_DIR": self.run_dir,
            "CHECKPOINTLESS_GENERATION": str(self._control.generation),
        }

    def failures(self, ranks: tuple[int, ...]) -> dict[int, ProcessFailure]:
        """By global rank, `ranks` first; the first of them is made the earliest, so that it is the root cause."""
        context = self._context
        if context is None:
            return {0: self._stopped()}
        if self._withdrawn or (not ranks and not self._bad):
            return {self.base: self._stopped()}
        failed = [
            rank for rank in self.ranks if context.children[rank - self.base].status and rank not in ranks
        ]
        found = {rank: context.failure(self._guilty[rank]) for rank in ranks}
        found |= {rank: context.failure(context.children[rank - self.base]) for rank in failed}
        if ranks:
            found[ranks[0]].timestamp = min(failure.timestamp for failure in found.values())
        return found

    def _stopped(self) -> ProcessFailure:
        """What the summary says where no worker has failed: torchrun needs one."""
        failure = ProcessFailure(local_rank=0, pid=os.getpid(), exitcode=1, error_file="")
        stopped = f"No worker of this node has failed. The job stopped: {self._reason}"
        failure.message = self._withdrawn or stopped
        failure.timestamp = int(time.time())
        return failure

    # ---- Witness ------------------------------

    def started(self, child: Child) -> None:
        """Passed on with the global rank, unless all are being stopped anyway."""
        if self._leaving is None and self.verdict is None:
            self._control.started(self.base + child.local_rank, child.incarnation, child.pid, child.token)

    def lost(self, child: Child) -> None:
        """Passed on, unless all are being stopped anyway."""
        if self._leaving is None and not child.afresh:
            self._control.lost(self.base + child.local_rank, child.incarnation)

    def exited(self, child: Child, status: int) -> None:
        """Passed on; while all are being stopped, the last one makes the restart due."""
        if child.again and status > 0:
            self._unwind_limit = 0.0  # perhaps it minds that: from now on all are forked anew
        if self._leaving is not None:
            self._look()
        elif child.afresh and self.verdict is None:
            self._present().replace(child.local_rank)
        else:
            self._control.exited(self.base + child.local_rank, child.incarnation, status)

    def stuck(self, child: Child) -> None:
        """Passed on: also while all are being stopped, it would be waited for without an end."""
        self._control.stuck(self.base + child.local_rank, child.pid)

    # ---- Workforce ------------------------------

    def replace(self, rank: int) -> None:
        """See Workforce."""
        if not self._decided():
            self._present().replace(rank - self.base)

    def kill(self, rank: int) -> None:
        """See Workforce."""
        if (
            self._context is not None and rank - self.base in self._context.children
        ):  # else it waits to be started
            self._signal(self._context.children[rank - self.base], SIGKILL)

    def restart_all(self, order: RunAgain) -> None:
        """See Workforce."""
        if self._decided():
            return
        goes_on = f"run the script again and go on at step {order.kept}"
        how = goes_on if order.kept >= 0 else f"are restarted (restart {order.restarts})"
        logger.warning("All workers %s: %s.", how, order.reason)
        self._leave(VerdictKind.RESTART, SIGTERM, self._unwind() if order.rung == 3 else [])

    def _unwind(self) -> list[Child]:
        """Have all workers leave the script that can; those that were asked."""
        if not self._unwind_limit:
            return []
        children = [child for child in self._present().children.values() if not child.gone and child.pid]
        asked = [child for child in children if self._control.tell(self.base + child.local_rank, Unwind())]
        limit = self._unwind_limit
        self._loop.call_later(limit, lambda: self._end_late(asked, limit))
        return asked

    def _end_late(self, asked: list[Child], limit: float) -> None:
        for child in asked:
            if not child.out and not child.gone:
                rank = self.base + child.local_rank
                logger.warning(
                    "rank %s did not leave the script within %g s: it is forked anew.", rank, limit
                )
                self._signal(child, SIGKILL)

    def answered(self, rank: int, message: Unwound | Afresh) -> None:
        """See Workforce."""
        child = self._present().children[rank - self.base]
        if isinstance(message, Afresh):
            child.afresh, self._unwind_limit = True, 0.0
            logger.warning(
                "rank %s is forked anew: in its old process the script failed: %s", rank, message.error
            )
            self._signal(child, SIGKILL)
        elif self._leaving is VerdictKind.RESTART and child.signal is None:
            child.out = True
            self._look()

    def give_up(self) -> None:
        """See Workforce."""
        if self._leaving is VerdictKind.RESTART:
            for child in self._present().children.values():
                child.out = False
            self._signal_all(self._present(), SIGKILL)
        if not self._decided():
            self._leave(VerdictKind.GAVE_WAY, SIGKILL)

    def _leave(self, kind: VerdictKind, number: Signals, spared: Sequence[Child] = ()) -> None:
        self._leaving = kind
        context = self._present()
        for child in context.children.values():
            if child not in spared:
                self._signal(child, number)
        self._loop.call_later(self._patience, lambda: self._signal_all(context, SIGKILL, spared))
        self._look()

    def _look(self) -> None:
        """Is nobody left to wait for?"""
        assert self._leaving is not None
        if all(child.out or child.status is not None for child in self._present().children.values()):
            self.verdict = Verdict(self._leaving)

    @property
    def ended(self) -> str:
        """See Workforce."""
        kind = self.verdict.kind if self.verdict is not None else None
        return kind.value if kind in (VerdictKind.SUCCEEDED, VerdictKind.FAILED) else ""

    def because(self, reason: str) -> None:
        """Why the job fails, for a summary on a node whose workers are not to blame."""
        self._reason = reason

    def has_ended(self, rank: int) -> bool:
        """See Workforce."""
        return self._context is None or self._context.culprit(rank - self.base).status is not None

    def succeed(self) -> None:
        """See Workforce."""
        if not self._decided():
            self.verdict = Verdict(VerdictKind.SUCCEEDED)

    def fail(self, ranks: list[int]) -> None:
        """See Workforce."""
        if self.verdict is None:
            self.verdict = Verdict(VerdictKind.FAILED, tuple(ranks))
            if self._context is not None:
                children, ended = self._context.children, self._leaving is not None
                self._guilty = {rank: self._context.culprit(rank - self.base) for rank in ranks}
                self._bad = [rank for rank in self.ranks if children[rank - self.base].status and not ended]
            self._leaving = None

    def withdraw(self, reason: str) -> None:
        """See Workforce."""
        if self.verdict is None:
            self._withdrawn, self._leaving = reason, None
            self.verdict = Verdict(VerdictKind.FAILED)

    def when_warm(self, then: Callable[[], None]) -> None:
        """See Workforce."""
        self._servers.when_ready(then)

    def learn(self, modules: list[str]) -> None:
        """See Workforce."""
        self._servers.learn(modules)

    def log_dir(self) -> str:
        """See Workforce."""
        return self._context.run_log_dir() if self._context is not None else ""

    def _decided(self) -> bool:
        return self.verdict is not None or self._leaving is not None

    def _present(self) -> ForkedContext:
        assert self._context is not None, "no worker has been started yet"
        return self._context

    def _signal(self, child: Child, number: Signals) -> None:
        self._present().send_signal(child, number)

    def _signal_all(self, context: ForkedContext, number: Signals, spared: Sequence[Child] = ()) -> None:
        for child in context.children.values():
            if child not in spared:
                context.send_signal(child, number)
