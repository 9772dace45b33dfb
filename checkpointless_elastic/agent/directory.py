"""What the agents of a job share before they are connected: who coordinates, in which term, and whether it lives."""

from __future__ import annotations

import functools
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from checkpointless_elastic.config import Config

__all__ = ["Directory", "Leader", "directory_opener", "process_name"]


def process_name() -> str:
    """Of this process, for people: the first part of its agent's name."""
    return f"{socket.gethostname()}-{os.getpid()}"


@dataclass(frozen=True)
class Leader:
    """A coordinator: its term (1, 2, ...), its agent's name, unique in the job, and "host:port" where it listens."""

    term: int
    agent: str
    address: str


class Directory(ABC):
    """Of one job. Calls come from one thread and take at most the limit given to `open` (seconds), except where said.

    Terms only go up, one at a time. Every call raises DirectoryError when the store fails; calls may be repeated.
    """

    @abstractmethod
    def newest(self) -> Leader | None:
        """The coordinator of the newest term; None before the first."""

    @abstractmethod
    def claim(self, leader: Leader) -> bool:
        """Atomic: make it the coordinator if the newest term is `leader.term - 1`; True also if it already is."""

    @abstractmethod
    def beat(self, term: int, count: int) -> bool:
        """The coordinator of this term says that it lives; False: a newer term exists and it must stop."""

    @abstractmethod
    def last_beat(self, term: int) -> int:
        """The newest count of this term's coordinator; -1: none yet."""

    @abstractmethod
    def wait_newer(self, term: int, timeout: float) -> Leader | None:
        """Wait in the store until a newer term exists; None after `timeout` seconds (and up to one limit)."""

    @abstractmethod
    def end(self, verdict: str) -> None:
        """The job has ended: 'succeeded' or 'failed: reason'. The first verdict stays."""

    @abstractmethod
    def verdict(self) -> str:
        """How the job ended; '' while it runs."""

    def host(self) -> str:
        """`process_name` of the agent in which the store lives; '' if no agent takes the store with it."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; from any thread. A waiting call ends within one limit. Raises nothing."""


def directory_opener(backend: str, params: RendezvousParameters, config: Config) -> Callable[[], Directory]:
    """Opens the directory for `--rdzv-backend`; waits up to `config.timeout` for the store, raises as `Directory` does.

    Raises ConfigError at once where the settings cannot be used.
    """
    if backend == "checkpointless-etcd":
        from checkpointless_elastic.agent.directory_etcd import etcd_opener

        return etcd_opener(params, config)
    from checkpointless_elastic.agent.directory_tcp import open_tcp

    return functools.partial(open_tcp, params, config)
