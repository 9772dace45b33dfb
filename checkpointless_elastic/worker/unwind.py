"""Takes the main thread out of the script, wherever it stands, so that the script can be run again in this process.

A signal's handler raises in the main thread: that also ends a sleep, a read or a lock that it waits in. The script may
swallow the exception, or be inside C when it comes, so it is raised again every 50 ms until the main thread is out of
the script. What does not come out at all is the agent's to end.
"""

from __future__ import annotations

import functools
import importlib
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType

__all__ = ["Unwinder", "Unwinding"]

SIGNAL = signal.SIGRTMAX
"""The last of those that no library is known to use: glibc takes its own from the other end."""
AGAIN_S = 0.05
_IMPORT: CodeType = importlib._bootstrap._load_unlocked.__code__  # type: ignore[attr-defined]
"""Runs once for each module that is imported. Read in CPython 3.11; test_unwind.py fails where it is not so."""


class Unwinding(BaseException):
    """Leaves the script. Not an Exception, so that the user's handlers do not take it."""


class Unwinder:
    """One per process, made on the main thread. ``spared(name)``: may the import of this module not be cut short?

    A module that stays loaded must not stay half loaded, so its import is waited for.

    Attributes:
        asked: set once the script is to be left.
    """

    def __init__(self, spared: Callable[[str], bool]) -> None:
        self.asked = threading.Event()
        self._spared = spared
        self._out = threading.Event()
        self._armed = False
        self._main = threading.main_thread().ident
        signal.signal(SIGNAL, self._interrupt)
        sys.unraisablehook = functools.partial(_tell, sys.unraisablehook)

    def ask(self) -> None:
        """Have the main thread leave the script. Any thread, once per run of the script; returns at once."""
        self.asked.set()
        threading.Thread(target=self._insist, name="checkpointless-unwind", daemon=True).start()

    def guard(self, call: Callable[[], int]) -> int:
        """The value of the call, 0 if it was left; `asked` says which. Main thread.

        The handler does not raise while this function's own frame runs, so nothing can be lost in between.
        """
        self._armed = True
        try:
            return call()
        except Unwinding:
            return 0
        finally:
            self._armed = False
            if self.asked.is_set():
                self._out.set()

    def again(self) -> None:
        """The script is about to be run again."""
        self.asked, self._out = threading.Event(), threading.Event()

    def _insist(self) -> None:
        assert self._main is not None
        out = self._out
        while not out.is_set():
            signal.pthread_kill(self._main, SIGNAL)
            out.wait(AGAIN_S)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._armed or not self.asked.is_set() or frame is None or frame.f_code is _GUARD:
            return
        if not self._imports(frame):
            raise Unwinding

    def _imports(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is _IMPORT and self._spared(frame.f_locals["spec"].name):
                return True
            frame = frame.f_back
        return False


def _tell(otherwise: Callable[[sys.UnraisableHookArgs], object], args: sys.UnraisableHookArgs, /) -> None:
    """In a finalizer or a weak reference's callback it is swallowed, and comes again: nobody has to know."""
    if not issubclass(args.exc_type, Unwinding):
        otherwise(args)


_GUARD = Unwinder.guard.__code__
