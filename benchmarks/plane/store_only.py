"""The same two things with a store alone, for comparison: each agent writes a key and waits for the coordinator's.

That is how torchrun's rendezvous works, at its best: all agents share one TCPStore, each has a connection and a thread
that waits for a key (torchrun looks every 0.1 s or less often), and the coordinator waits for the keys of all at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from plane.process import LIMIT_S, raise_limits

CONNECT_AT_ONCE = 32

__all__ = ["open_store", "store_process"]


def open_store(port: int = 0, host: bool = False) -> TCPStore:
    """The store, or a connection to it."""
    limit = timedelta(seconds=LIMIT_S)
    return TCPStore("127.0.0.1", port, is_master=host, timeout=limit, wait_for_workers=False)


def store_process(first: int, count: int, total: int, port: int, pipe: Connection) -> None:
    """Body of a process with agents ``first`` to ``first + count``; agent 0 coordinates all ``total``."""
    raise_limits()
    with ThreadPoolExecutor(CONNECT_AT_ONCE) as pool:  # a connection looks a name up, which may take seconds
        stores = list(pool.map(lambda number: open_store(port), range(count)))
    agents = [_Agent(first + number, store) for number, store in enumerate(stores)]
    coordinator = _Coordinator(total, open_store(port)) if first == 0 else None
    pipe.send("connected")
    while True:
        order, number = pipe.recv()
        bodies: list[Callable[[int], None]] = [getattr(agent, order) for agent in agents]
        if coordinator is not None:
            bodies.append(getattr(coordinator, order))
        threads = [threading.Thread(target=body, args=(number,)) for body in bodies]
        for thread in threads:
            thread.start()
        if order == "recover":
            pipe.send("waits")
        for thread in threads:
            thread.join()
        began, ended = min(agent.began for agent in agents), max(agent.ended for agent in agents)
        pipe.send((began, ended, coordinator.frozen if coordinator is not None else 0.0))


class _Agent:
    """Times are of time.monotonic()."""

    def __init__(self, number: int, store: TCPStore) -> None:
        self._number, self._store = number, store
        self.began = self.ended = 0.0

    def commit(self, step: int) -> None:
        self.began = time.monotonic()
        self._store.set(f"ready/{step}/{self._number}", "1")
        self._store.wait([f"commit/{step}"])
        self.ended = time.monotonic()

    def recover(self, generation: int) -> None:
        self._store.wait([f"freeze/{generation}"])
        self._store.set(f"answer/{generation}/{self._number}", "1")


class _Coordinator:
    """``frozen``: when all had answered."""

    def __init__(self, agents: int, store: TCPStore) -> None:
        self._agents, self._store = range(agents), store
        self.frozen = 0.0

    def commit(self, step: int) -> None:
        self._store.wait([f"ready/{step}/{number}" for number in self._agents])
        self._store.set(f"commit/{step}", "1")

    def recover(self, generation: int) -> None:
        self._store.wait([f"lost/{generation}"])
        self._store.set(f"freeze/{generation}", "1")
        self._store.wait([f"answer/{generation}/{number}" for number in self._agents])
        self.frozen = time.monotonic()
