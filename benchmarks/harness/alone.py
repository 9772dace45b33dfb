"""A session for process groups of benchmarks that run without an agent."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from checkpointless_elastic.groups import LoggedCollective, Situation

LIMIT_S = 120.0


class Alone:
    """A session for groups without an agent: the freeze is the abort itself."""

    def __init__(self) -> None:
        self.frozen = threading.Event()

    def situation(self) -> Situation:
        return Situation.ATTEMPT

    def is_frozen(self) -> bool:
        return self.frozen.is_set()

    def wait_for_loss(self, explains: Callable[[], bool]) -> bool:
        return self.frozen.wait(LIMIT_S) and explains()

    def recover_outside(self) -> None:
        raise RuntimeError("Nothing is recovered here.")

    def record(self, entry: LoggedCollective) -> None:
        """Nobody replaces this rank."""

    def replay(self, group: str, op: str) -> LoggedCollective | None:
        return None

    def void_after_commit(self, outputs: list[torch.Tensor]) -> None:
        """There is no gate."""
