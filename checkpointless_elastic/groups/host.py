"""What the process groups ask of the worker's session, and what they tell it."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Host", "LoggedCollective", "Situation", "is_apart"]


class Situation(enum.Enum):
    """Where the calling thread stands, which decides what a collective without its peers does."""

    STARTUP = "startup"
    """Before the first step, or outside any protection: live, outputs recorded; a lost peer is an error."""
    ATTEMPT = "attempt"
    """Inside a replayable function, before its gate: outputs of void collectives are filled with valid values."""
    COMMITTED = "committed"
    """Inside one, after its gate: outputs of void collectives are NaN (zero for integers), and counted."""
    OUTSIDE = "outside"
    """Outside any replayable function after the first step: recover in place, then repeat the collective."""
    APART = "apart"
    """In a thread of the script beside its main one (an asynchronous checkpoint): live; a lost peer is an error."""


def is_apart(main: int) -> bool:
    """Whether the caller is on a thread that the script has started, and not on thread `main` or one of autograd."""
    if threading.get_ident() == main:
        return False
    return not isinstance(threading.current_thread(), threading._DummyThread)  # C++ has started that


@dataclass(frozen=True)
class LoggedCollective:
    """One collective of a rank before its first step or outside its steps.

    Attributes:
        group: name of the process group.
        op: what was called, as `ops.Op.name` has it.
        outputs: raw bytes of each tensor written, in order; None where they were too large to keep (over 1 MiB).
    """

    group: str
    op: str
    outputs: tuple[bytes, ...] | None


class Host(Protocol):
    """The worker's session, as process groups see it. All calls come from the thread that issued the collective."""

    def situation(self) -> Situation:
        """Where the calling thread stands. Never blocks; asked once or twice for each collective."""

    def is_frozen(self) -> bool:
        """True while a freeze is in force."""

    def wait_for_loss(self, explains: Callable[[], bool]) -> bool:
        """A collective failed: waits for a loss that ``explains`` it, for half a second if none is suspected.

        True if it came. A freeze in force need not be the one: that of another rank may follow.
        """

    def recover_outside(self) -> None:
        """Takes part in the recovery and returns when the groups are rebuilt. Main thread; blocks."""

    def record(self, entry: LoggedCollective) -> None:
        """Keeps the outputs of a finished collective for a replacement of this rank."""

    def replay(self, group: str, op: str) -> LoggedCollective | None:
        """In shadow: the next logged collective of this group, or None if there is none left."""

    def void_after_commit(self, outputs: list[torch.Tensor]) -> None:
        """These outputs were filled with NaN (zero for integers) after the gate."""
