"""Forked workers behind torch's `PContext`, so that log directories, redirects, tees and filters are torch's own code.

Read in torch 2.6 and 2.13: `PContext.__init__` makes the log directories (through `LogsSpecs.reify`), `start` installs
the signal handlers and the tails, `close` ends both. New here is `replace`, which forks one worker again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.distributed.elastic.multiprocessing.api import LogsSpecs, PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from checkpointless_elastic.agent.credentials import without_secrets
from checkpointless_elastic.agent.forkserver import SpawnRequest
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.agent.servers import ForkServers
from checkpointless_elastic.protocol.messages import Again

__all__ = ["Child", "ForkedContext", "Launch", "Witness", "parse_command"]

logger = logging.getLogger(__name__)

KILL_LIMIT_S = 30.0
"""How long a worker of a running job may take to end after SIGKILL: giving back much memory takes seconds."""
_KILL_TIMEOUT_S = 10.0
"""The same when the job ends anyway."""


@dataclass
class Child:
    """One incarnation of one local rank.

    Attributes:
        pid: 0 until it is forked.
        pidfd: -1 before the fork and after the end.
        gone: the process has ended.
        status: exit code or negative signal; None until it is known.
        ended: wall clock of its end, in seconds.
        error_file: where it was put when the next incarnation came; empty: where torch wants it.
        signal: to be sent as soon as it is forked.
        again: it runs the script in a process that has run it before.
        out: it has left the script in rung 3, and waits to run it again.
        afresh: it is to be forked anew once it has ended: the script fails where it ran before.
    """

    local_rank: int
    incarnation: int
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    pid: int = 0
    pidfd: int = -1
    gone: bool = False
    status: int | None = None
    ended: float = 0.0
    error_file: str = ""
    signal: signal.Signals | None = None
    again: bool = False
    out: bool = False
    afresh: bool = False

    def next(self) -> Child:
        """The next incarnation: in the same process if that is out of the script."""
        number = self.incarnation + 1
        if not self.out or self.gone:
            return Child(self.local_rank, number)
        return Child(self.local_rank, number, pid=self.pid, pidfd=self.pidfd, again=True)


class Witness(Protocol):
    """Who is told of workers' lives, on the loop's thread."""

    def started(self, child: Child) -> None: ...

    def lost(self, child: Child) -> None: ...

    def exited(self, child: Child, status: int) -> None: ...

    def stuck(self, child: Child) -> None:
        """SIGKILL was sent KILL_LIMIT_S ago, and the process is still there: it hangs in the kernel."""


@dataclass(frozen=True)
class Launch:
    """What a context is made of, apart from what torch's own constructor takes.

    Attributes:
        environment: additional variables for one incarnation, made when it is forked.
        run_again: has a worker that is out of the script run it again, as the next incarnation; False: it cannot.
        cpus: CPUs that a local rank is bound to; empty for all.
    """

    loop: EventLoop
    servers: ForkServers
    witness: Witness
    environment: Callable[[Child], Mapping[str, str]]
    run_again: Callable[[Child, Again], bool]
    cpus: Callable[[int], list[int]]


def parse_command(entrypoint: str, args: tuple[str, ...]) -> tuple[str, list[str], bool]:
    """(mode, argv, unbuffered) of the command line that torchrun makes.

    `python [-u] [-m] target ...` of this very interpreter runs in the fork; anything else is a program to execute.
    """
    rest = list(args)
    if entrypoint == sys.executable:
        unbuffered = rest[:1] == ["-u"]
        rest = rest[1:] if unbuffered else rest
        module = rest[:1] == ["-m"]
        rest = rest[1:] if module else rest
        if rest and not rest[0].startswith("-"):
            return ("module" if module else "script"), rest, unbuffered
    return "exec", [entrypoint, *args], False


class ForkedContext(PContext):
    """The present workers of this node, one child per local rank."""

    def __init__(
        self,
        name: str,
        entrypoint: str,
        args: dict[int, tuple[str, ...]],
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        launch: Launch,
        children: dict[int, Child],
        **options: Any,
    ) -> None:
        super().__init__(name, entrypoint, args, envs, logs_specs, **options)
        self._program = entrypoint
        self._launch = launch
        self._witness: Witness | None = launch.witness
        self._requests: dict[int, Child] = {}
        self._numbers = itertools.count(next(_first_numbers))
        self._by_pid: dict[int, Child] = {}
        self.children = {rank: children.get(rank) or Child(rank, 0) for rank in range(self.nprocs)}
        self._replaced: dict[int, Child] = {}  # by local rank, the worker before the present one

    # ---- starting ------------------------------

    def _start(self) -> None:
        """Fork all workers; returns when all exist (the first time that includes the loading of the fork server)."""
        self._launch.servers.offspring = self
        for child in self.children.values():
            if child.pid:
                self._run_again(child)
            else:
                self._request(child, append=False)
        self._launch.loop.run(until=lambda: not self._requests)

    def replace(self, local_rank: int) -> None:
        """Fork the next incarnation of a local rank whose process is gone. Log files are continued. Does not block."""
        old = self._replaced[local_rank] = self.children[local_rank]
        self._keep_error_file(old)
        self.children[local_rank] = Child(local_rank, old.incarnation + 1)
        self._request(self.children[local_rank], append=True)

    def _keep_error_file(self, old: Child) -> None:
        """On the loop: the log directory has just answered, see `health`."""
        path = self.error_files[old.local_rank]
        if os.path.isfile(path):
            stem, suffix = os.path.splitext(path)
            old.error_file = f"{stem}.{old.incarnation}{suffix}"
            os.replace(path, old.error_file)

    def _run_again(self, child: Child) -> None:
        """The next incarnation in a process that lives."""
        rank = child.local_rank
        again = Again(self._environment(child, "script"), self.stdouts[rank], self.stderrs[rank])
        told = self._launch.run_again(child, again)
        self._watch(child)
        if not told:
            self.send_signal(child, signal.SIGKILL)  # its loss is then one as any other

    def _environment(self, child: Child, mode: str) -> dict[str, str]:
        ours = self._launch.environment(child) if mode != "exec" else {}
        return {**without_secrets(os.environ), **self.envs[child.local_rank], **ours}

    def _request(self, child: Child, append: bool) -> None:
        rank = child.local_rank
        arguments = tuple(str(argument) for argument in self.args[rank])
        mode, argv, unbuffered = parse_command(self._program, arguments)
        env = self._environment(child, mode)
        number = next(self._numbers)
        self._requests[number] = child
        self._launch.servers.spawn(
            SpawnRequest(
                id=number,
                mode=mode,
                argv=argv,
                env=env,
                stdout=self.stdouts[rank],
                stderr=self.stderrs[rank],
                append=append,
                unbuffered=unbuffered,
                cpus=self._launch.cpus(rank),
            )
        )

    # ---- what the fork server reports ------------------------------

    def spawned(self, request: int, pid: int) -> None:
        """A child exists: watch its process."""
        child = self._requests.pop(request)
        child.pid = pid
        self._watch(child)

    def _watch(self, child: Child) -> None:
        self._by_pid[child.pid] = child
        if self._witness is not None:
            self._witness.started(child)
        if child.signal is not None:
            self.send_signal(child, child.signal)
        try:
            if child.pidfd < 0:
                child.pidfd = os.pidfd_open(child.pid)
        except ProcessLookupError:  # ended and reaped already; its status is on its way
            self._lost(child)
            return
        self._launch.loop.watch(child.pidfd, lambda: self._lost(child), first=True)

    def exited(self, pid: int, status: int) -> None:
        """The fork server has reaped a child; its status is reported after its loss."""
        child = self._by_pid.pop(pid, None)
        if child is None:  # of an earlier context, which gave it up
            return
        self._lost(child)
        child.status = status
        if self._witness is not None:
            self._witness.exited(child, status)

    def _lost(self, child: Child) -> None:
        if child.pidfd >= 0:
            self._launch.loop.unwatch(child.pidfd)
            os.close(child.pidfd)
            child.pidfd = -1
        if child.gone:
            return
        child.gone = True
        child.ended = time.time()
        if self._witness is not None:
            self._witness.lost(child)

    # ---- stopping ------------------------------

    def send_signal(self, child: Child, number: signal.Signals) -> None:
        """Signal a worker and the processes of its group; one that is not forked yet gets it as soon as it is."""
        if child.gone or child.status is not None:
            return
        child.signal = number
        if not child.pid:
            return
        if number is signal.SIGKILL:
            self._launch.loop.call_later(KILL_LIMIT_S, lambda: self._must_be_gone(child))
        for send in (os.killpg, os.kill):  # it is its group's leader, but for its very first moment
            try:
                send(child.pid, number)
                return
            except ProcessLookupError:
                continue

    def _must_be_gone(self, child: Child) -> None:
        if not child.gone and self._witness is not None:
            self._witness.stuck(child)

    def quiet(self) -> None:
        """From now on nobody is told of these workers."""
        self._witness = None

    def all_ended(self) -> bool:
        """Whether no process is left, but for those out of the script, and each status is known."""
        return not self._left()

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        """Stop all workers; blocks for up to `timeout` seconds, while the loop goes on serving everything else."""
        self.quiet()
        for number, patience in ((death_sig, timeout), (signal.SIGKILL, _KILL_TIMEOUT_S)):
            # One that was killed already, and is still there, does not heed a milder signal.
            told = [c for c in self._left() if number is signal.SIGKILL or c.signal is not signal.SIGKILL]
            for child in told:
                logger.warning(
                    "Sending process %s closing signal %s", child.pid or "(not forked yet)", number.name
                )
                self.send_signal(child, number)
            self._launch.loop.run(functools.partial(_ended, told), patience)
        for child in self._left():
            logger.error(
                "Process %s does not end after SIGKILL: it hangs in the kernel and is left behind.", child.pid
            )
            child.status = -signal.SIGKILL  # so that nobody waits for it again

    def _left(self) -> list[Child]:
        return [child for child in self.children.values() if child.status is None and not child.out]

    # ---- torch's interface ------------------------------

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return {rank: child.pid for rank, child in self.children.items()}

    def _poll(self) -> RunProcsResult | None:
        """The result once a worker has failed or all have ended; None before."""
        failures = {child.local_rank: self.failure(child) for child in self.children.values() if child.status}
        if not failures and not self.all_ended():
            return None
        self.close()
        values = {} if failures else dict.fromkeys(range(self.nprocs))
        return RunProcsResult(values, failures, self.stdouts, self.stderrs)

    def culprit(self, local_rank: int) -> Child:
        """While workers run: who has failed, the present one or, if that lives, the one that it replaced."""
        child = self.children[local_rank]
        return child if child.gone else self._replaced.get(local_rank, child)

    def failure(self, child: Child) -> ProcessFailure:
        """What torchrun's summary says about this worker; without an error file its time is that of its end."""
        failure = ProcessFailure(
            local_rank=child.local_rank,
            pid=child.pid,
            exitcode=child.status or 0,
            error_file=child.error_file or self.error_files[child.local_rank],
        )
        if not os.path.isfile(failure.error_file):
            failure.timestamp = int(child.ended)
        return failure

    def run_log_dir(self) -> str:
        """Directory of this run, above `attempt_N/<local rank>/error.json`; empty if nothing is logged to files."""
        path = self.error_files.get(0, os.devnull)
        return "" if path == os.devnull else os.path.dirname(os.path.dirname(os.path.dirname(path)))


def _ended(children: Iterable[Child]) -> bool:
    return all(child.status is not None for child in children)


_first_numbers = itertools.count(0, 1 << 20)  # a context's request numbers never meet those of an earlier one
