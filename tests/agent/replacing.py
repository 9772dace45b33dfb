"""Runs torchrun with a control plane that replaces each worker that fails, and nothing else.

Used by tests as `python replacing.py [--learn MODULE,...] torchrun options`. Each order to replace is written to
`replaced` in the current folder as "rank incarnation time"; `learned` appears once a successor has taken over.
"""

from __future__ import annotations

import sys
import time

from torch.distributed import run

from checkpointless_elastic.agent import agent
from checkpointless_elastic.agent.rendezvous import CheckpointlessRendezvousHandler
from checkpointless_elastic.agent.runtime import EventLoop, Workforce
from checkpointless_elastic.protocol.between import Seated


class ReplacingControl:
    """Replaces at the loss if the status is not awaited, which is what a protected job does."""

    serves_workers = False
    generation = 0

    def __init__(self, learn: list[str], handler: CheckpointlessRendezvousHandler) -> None:
        self._learn = learn
        self._handler = handler
        self._running: set[int] = set()

    def await_seat(self) -> bool:
        return True

    def attach(self, loop: EventLoop, workers: Workforce, size: int) -> None:
        self._loop, self._workers = loop, workers
        self.seat = Seated(1, 0, [0], size, self._handler.open_store(), "", 0, 0, False)
        if self._learn:
            workers.learn(self._learn)
            self._look()

    def _look(self) -> None:
        loaded = self._workers._servers.loaded  # type: ignore[attr-defined]
        if set(self._learn) <= set(loaded):
            with open("learned", "w") as file:
                file.write("\n".join(loaded) + "\n")
        else:
            self._loop.call_later(0.05, self._look)

    def started(self, rank: int, incarnation: int, pid: int, token: str) -> None:
        self._running.add(rank)
        with open("started", "a") as file:
            file.write(f"{rank} {incarnation} {pid} {len(token)}\n")

    def lost(self, rank: int, incarnation: int) -> None:
        with open("lost", "a") as file:
            file.write(f"{rank} {incarnation}\n")

    def exited(self, rank: int, incarnation: int, status: int) -> None:
        self._running.discard(rank)
        if status:
            with open("replaced", "a") as file:
                file.write(f"{rank} {incarnation + 1} {time.time()}\n")
            self._workers.replace(rank)
        elif not self._running:
            self._workers.succeed()

    def stuck(self, rank: int, pid: int) -> None:
        """None is."""

    def will_end(self, cause: str) -> None:
        """There are no other agents."""

    def leave(self) -> None:
        pass

    def stopped(self) -> None:
        with open("stopped", "a") as file:
            file.write("stopped\n")


if __name__ == "__main__":
    learn = sys.argv.pop(2).split(",") if sys.argv[1] == "--learn" else []
    if learn:
        sys.argv.pop(1)
    agent.make_control = lambda handler, spec: ReplacingControl(learn, handler)  # type: ignore[assignment]
    run.main()
