"""The directory in a TCPStore that the agent on the endpoint's machine hosts: nothing to install, lost with that agent.

One key per term, written by compare_set and never changed, so a term has one coordinator and terms have no gaps; a
coordinator is fenced when the next term's key exists. Agents wait for the next term in the store, which answers as soon
as its key is set. The host is to be the first coordinator, so that the job depends on one agent and not on two.
torch 2.13 writes two lines to stderr for each wait that ends unanswered, so a wait is never given up: it has a
connection of its own and goes on when `wait_newer` returns without a term.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TypeVar

import msgspec
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

from checkpointless_elastic.agent.bounded import BoundedCaller
from checkpointless_elastic.agent.directory import Directory, Leader, process_name
from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import DirectoryError

__all__ = ["TcpDirectory", "open_tcp"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_HOST = "host"

PROBE_S = 1.0
"""How often a waiting agent looks whether the store still answers and the directory is still open."""
FOREVER = timedelta(days=7)
"""TCPStore counts milliseconds in 32 bits."""


def open_tcp(params: RendezvousParameters, config: Config) -> TcpDirectory:
    """The directory at `--rdzv-endpoint`; without a port, the host's agent takes any."""
    host, port = parse_rendezvous_endpoint(str(params.endpoint or "").strip(), default_port=0)
    is_host = {"true": True, "false": False}.get(config.is_host)
    limit, timeout = config.store_timeout.total_seconds(), config.timeout.total_seconds()
    return TcpDirectory.open(host, port, params.run_id, limit, timeout=timeout, is_host=is_host)


class TcpDirectory(Directory):
    """See the module.

    Attributes:
        endpoint: "host:port" of the store.
        hosts: whether the store is in this process; it is gone when this process closes the directory.
    """

    def __init__(
        self, caller: BoundedCaller, store: TCPStore, hosts: bool, run_id: str, limit: float
    ) -> None:
        self.endpoint = f"{store.host}:{store.port}"
        self.hosts = hosts
        self._caller = caller
        self._host, self._port = store.host, store.port
        self._prefix = f"checkpointless/{run_id}"
        self._store: PrefixStore | None = PrefixStore(self._prefix, store)
        self._limit = limit
        self._known: Leader | None = None
        self._waiter = BoundedCaller("checkpointless-new-term")
        self._awaited: Future[None] | None = None
        self._wait_store: PrefixStore | None = None
        if hosts:
            self._store.set(_HOST, process_name())

    @classmethod
    def open(
        cls,
        host: str,
        port: int,
        run_id: str,
        limit: float,
        *,
        timeout: float,
        is_host: bool | None = None,
    ) -> TcpDirectory:
        """Host the store if `host` is this machine and the port is free, else connect, within `timeout` seconds.

        ``is_host``: decides instead of the host's name. Port 0: any, for agents that are told it otherwise.
        """
        caller = BoundedCaller("checkpointless-directory")
        reason = ""
        if is_host or (is_host is None and _matches_machine_hostname(host)):
            try:
                store = caller.call(lambda: _open(host, port, True, limit, limit), timeout + limit)
                logger.info("This agent hosts the rendezvous store at %s:%d.", host, store.port)
                return cls(caller, store, True, run_id, limit)
            except (RuntimeError, ValueError, TimeoutError) as error:
                reason = _first_line(error)
        if is_host or port == 0:
            caller.close()
            raise DirectoryError(_cannot_host(host, port, reason))
        logger.info("Connecting to the rendezvous store at %s:%d for up to %g s.", host, port, timeout)
        try:
            store = caller.call(lambda: _open(host, port, False, timeout, limit), timeout + limit)
        except (RuntimeError, ValueError, TimeoutError) as error:
            caller.close()
            raise DirectoryError(
                _cannot_connect(host, port, timeout, reason or _first_line(error))
            ) from error
        return cls(caller, store, False, run_id, limit)

    def newest(self) -> Leader | None:
        return self._call(self._newest, "look up the coordinator")

    def claim(self, leader: Leader) -> bool:
        if leader.term < 1:
            raise ValueError(f"Terms begin at 1, not {leader.term}.")
        if leader.term == 1 and not self.hosts:
            self.wait_newer(
                0, self._limit / 2
            )  # a start for the host: the fewer agents that must live, the better
        mine = msgspec.json.encode(leader)

        def claim(store: PrefixStore) -> bool:
            if leader.term > 1 and not store.check([_leader(leader.term - 1)]):
                return False
            held = store.compare_set(_leader(leader.term), "", mine.decode())
            return bool(held == mine) and not store.check([_leader(leader.term + 1)])

        return self._call(claim, f"claim term {leader.term}")

    def beat(self, term: int, count: int) -> bool:
        def beat(store: PrefixStore) -> bool:
            store.set(f"beat/{term}", str(count))  # sent, not answered: the check below is
            return not store.check([_leader(term + 1)])

        return self._call(beat, f"beat in term {term}")

    def last_beat(self, term: int) -> int:
        def last_beat(store: PrefixStore) -> int:
            return int(store.get(f"beat/{term}")) if store.check([f"beat/{term}"]) else -1

        return self._call(last_beat, f"read the beats of term {term}")

    def wait_newer(self, term: int, timeout: float) -> Leader | None:
        deadline = time.monotonic() + timeout
        while True:
            leader = self.newest()
            if leader is not None and leader.term > term:
                return leader
            left = min(deadline - time.monotonic(), PROBE_S)
            if left <= 0:
                return None
            self._wait(leader.term + 1 if leader else 1, left)

    def end(self, verdict: str) -> None:
        if not verdict:
            raise ValueError("A verdict says how the job ended; it cannot be empty.")
        self._call(lambda store: store.compare_set("verdict", "", verdict), "write the verdict")

    def verdict(self) -> str:
        def verdict(store: PrefixStore) -> str:
            return str(store.get("verdict").decode()) if store.check(["verdict"]) else ""

        return self._call(verdict, "read the verdict")

    def host(self) -> str:
        def host(store: PrefixStore) -> str:
            return str(store.get(_HOST).decode()) if store.check([_HOST]) else ""

        return self._call(host, "read which agent hosts the store")

    def close(self) -> None:
        self._store = None
        self._caller.close()
        self._waiter.close()  # a wait that is not answered lasts as long as the store or this process

    def _newest(self, store: PrefixStore) -> Leader | None:
        term = self._known.term if self._known else 0
        while store.check([_leader(term + 1)]):
            term += 1
        if term and (self._known is None or self._known.term != term):
            self._known = msgspec.json.decode(store.get(_leader(term)), type=Leader)
        return self._known

    def _wait(self, term: int, seconds: float) -> None:
        """Until somebody has claimed the term, which nobody has yet, or for that long."""
        if self._awaited is None or self._awaited.done():
            self._awaited = self._waiter.submit(lambda: self._await(_leader(term)))
        wait([self._awaited], seconds)
        if self._awaited.done() and (error := self._awaited.exception()) is not None:
            raise self._failure(error, "wait for a new coordinator") from error

    def _await(self, key: str) -> None:
        """On the waiter's thread, with its connection."""
        if self._wait_store is None:
            store = _open(self._host, self._port, False, self._limit, self._limit)
            self._wait_store = PrefixStore(self._prefix, store)
        self._wait_store.wait([key], FOREVER)

    def _call(self, work: Callable[[PrefixStore], T], aim: str) -> T:
        store = self._store
        if store is None:
            raise DirectoryError(
                f"The connection to the rendezvous store at {self.endpoint} is closed; cannot {aim}."
            )
        try:
            return self._caller.call(lambda: work(store), self._limit)
        except (RuntimeError, ValueError, TimeoutError, msgspec.DecodeError) as error:
            raise self._failure(error, aim) from error

    def _failure(self, error: BaseException, aim: str) -> DirectoryError:
        return DirectoryError(
            f"The rendezvous store at {self.endpoint} failed ({_first_line(error)}), so this agent cannot {aim}; "
            f"it lives in the agent that hosts it and is lost with it: start the job again, or use "
            f"--rdzv-backend checkpointless-etcd, which survives the loss of any node."
        )


def _leader(term: int) -> str:
    return f"leader/{term}"


def _open(host: str, port: int, is_host: bool, timeout: float, limit: float) -> TCPStore:
    store = TCPStore(
        host, port, is_master=is_host, timeout=timedelta(seconds=timeout), wait_for_workers=False
    )
    store.set_timeout(timedelta(seconds=limit))
    return store


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _cannot_host(host: str, port: int, reason: str) -> str:
    if not reason:
        return f"The port of {host} is not known; give --rdzv-endpoint HOST:PORT, the same on all nodes."
    return (
        f"No rendezvous store can be opened at {host}:{port} ({reason}); give a free port of this machine in "
        f"--rdzv-endpoint, or leave is_host out of --rdzv-conf if another agent hosts it."
    )


def _cannot_connect(host: str, port: int, timeout: float, reason: str) -> str:
    return (
        f"No rendezvous store answered at {host}:{port} within {timeout:g} s ({reason}); check that the agent on that "
        f"machine runs and that --rdzv-endpoint names it by a name or address it knows as its own."
    )
