"""Rung 3 in the surviving process: the script is run again from its top, as if the process were new.

The process keeps its id, its CUDA context and the libraries that it has loaded. Everything of the script goes: its
processes, threads, modules, groups, memory. What does not go is looked for, and if something is found the worker ends
itself instead, and its agent starts a new one.

1. The listener gets `Unwind`: it makes all groups void and has the main thread leave the script (`unwind`).
2. The main thread clears up, checks and says `Unwound`. All this has a limit, which the agent keeps.
3. When all workers of the node are out of the script, or gone, the agent says `Again`: what a fresh fork is given.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch

from checkpointless_elastic.data.cursor import Cursor
from checkpointless_elastic.errors import CheckpointlessError
from checkpointless_elastic.groups.leaving import leave
from checkpointless_elastic.groups.registry import Registry
from checkpointless_elastic.protocol.messages import Afresh, Unwound
from checkpointless_elastic.state import arena, sharding
from checkpointless_elastic.worker import bootstrap, exchange, lifeline, run, session, surroundings
from checkpointless_elastic.worker.channel import AgentGone
from checkpointless_elastic.worker.ending import leave_if_stuck
from checkpointless_elastic.worker.leftovers import Memory, end_children, strays
from checkpointless_elastic.worker.purge import Modules
from checkpointless_elastic.worker.script_end import script_ended
from checkpointless_elastic.worker.session import Session, connect_from_env
from checkpointless_elastic.worker.unwind import Unwinder, Unwinding

__all__ = ["Process", "rehearse"]

logger = logging.getLogger(__name__)

NEWS_S = 1.0
"""How long a script without a Run that failed, perhaps because a peer was lost, waits for the news of that."""

Script = Callable[[Callable[[BaseException], None]], tuple[BaseException | None, int]]


def rehearse() -> None:
    """Look at what a `Process` will note, see `bootstrap.rehearse`."""
    Modules()
    surroundings.look()


class Process:
    """A worker process that can run its script several times. Made on the main thread before the first run."""

    def __init__(self) -> None:
        self._runs = 0
        self._modules = Modules()
        self._unwinder = Unwinder(self._modules.stays)
        self._restore = surroundings.keep()
        self._threads = {*threading.enumerate()}
        self._memory = Memory()

    def run(self, script: Script) -> int:
        """Run the script until it ends and is not to be run again; its exit code."""
        while True:
            connect_from_env(self._unwinder.ask)
            code = self._unwinder.guard(lambda: self._once(script))
            if not self._unwinder.asked.is_set():
                leave_if_stuck(code)
                return code
            self._again()

    def _once(self, script: Script) -> int:
        self._runs += 1
        error, code = script(self._await_news)
        present = _present()
        if error is not None and self._runs > 1 and not present.registry.used:
            sentence = traceback.format_exception_only(type(error), error)[-1].strip()
            surroundings.flush()
            present.channel.control.send(Afresh(sentence))
            present.again.get()  # does not come: the agent ends this process
        else:
            script_ended(present, error)
        return code

    def _await_news(self, error: BaseException) -> None:
        """Without a Run a peer that is lost shows as an error here, before the agent can say what follows."""
        explained = isinstance(error, (RuntimeError, CheckpointlessError)) and _present().recovery is None
        if explained and self._unwinder.asked.wait(NEWS_S):
            raise Unwinding

    def _again(self) -> None:
        present = _present()
        reason = self._clear(present)
        if reason:
            self._give_up(present, reason)
        try:
            present.channel.control.send(Unwound())
        except AgentGone:  # this worker had said its last word just before
            os._exit(1)
        again = present.again.get()
        present.channel.close()
        lifeline.let_go()
        session.forget()
        bootstrap.prepare(again.env, again.stdout, again.stderr, False, [])
        self._unwinder.again()

    def _clear(self, present: Session) -> str:
        """Nothing of the script is left, or the sentence says what is."""
        self._restore()
        _forget()
        end_children()
        groups = leave(present.registry)
        _release(present)
        modules = self._modules.purge()
        gc.collect()
        stray = strays(self._threads)
        if stray:
            return f"threads of the script are still running: {stray}"
        for module in modules:
            vars(module).clear()  # a library may hold a class of the script, and with it all of this
        gc.collect()
        if any(group() is not None for group in groups):
            return "a process group of the script is still held by a library"
        return self._memory.kept()

    def _give_up(self, present: Session, reason: str) -> None:
        where = f"[rank {present.rank}]"
        logger.error(
            "%s The script cannot be run again in this process: %s. A new one follows.", where, reason
        )
        logging.shutdown()
        os._exit(1)


def _present() -> Session:
    found = session.current()
    assert found is not None
    return found


def _release(present: Session) -> None:
    """The session lets go of all that belongs to the script; its connections stay."""
    present.registry = Registry(present, shadow=False)
    present.recovery = present.resume = None
    present.cursor = Cursor.new()
    present.slot.close()


def _forget() -> None:
    """What this package, and torch, keep per process."""
    run.forget()
    exchange.forget()
    arena.forget()
    sharding.forget()
    loading: Any = sys.modules.get("torch.utils.data._utils.signal_handling")
    if loading is not None:
        loading._SIGCHLD_handler_set = False
    compiling: Any = sys.modules.get("torch._inductor.async_compile")
    if compiling is not None:
        compiling.shutdown_compile_workers()
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.seed_all()
