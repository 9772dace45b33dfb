"""The embedded store: who hosts it, and what agents see when the host is gone, stopped or not there yet."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from checkpointless_elastic.agent.directory import Leader
from checkpointless_elastic.agent.directory_tcp import TcpDirectory
from checkpointless_elastic.errors import DirectoryError
from tests.conftest import wait_until
from tests.directory.etcd_server import free_ports

LIMIT_S = 1.0
LEADER = Leader(1, "a", "a.example:29400")

NURSERY = """
import os, signal, sys, threading
from checkpointless_elastic.agent.directory_tcp import TcpDirectory
from checkpointless_elastic.errors import DirectoryError


def host():
    directory = TcpDirectory.open("localhost", 0, "job", 5.0, timeout=5.0, is_host=True)
    print(os.getpid(), directory.endpoint.rsplit(":", 1)[1], flush=True)
    threading.Event().wait()


def stuck(port, host):
    directory = TcpDirectory.open("localhost", int(port), "job", 0.5, timeout=5.0, is_host=False)
    os.kill(int(host), signal.SIGSTOP)
    try:
        while True:
            directory.newest()
    except DirectoryError:
        print("failed as it should", flush=True)


for line in sys.stdin:
    name, *arguments = line.split()
    pid = os.fork()
    if pid == 0:
        globals()[name](*arguments)
        sys.exit(0)
    if name == "stuck":
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Forks processes that have torch loaded: one import for all tests."""


class Nursery:
    """The process that runs NURSERY. Its children are in its process group and end with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@dataclass
class Host:
    """A process that hosts a store; a test may stop it."""

    pid: int
    port: int
    job: str

    def stop(self) -> None:
        self._send(signal.SIGSTOP, psutil.STATUS_STOPPED)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._send(signal.SIGKILL, psutil.STATUS_ZOMBIE)

    def _send(self, number: signal.Signals, status: str) -> None:
        os.kill(self.pid, number)
        wait_until(lambda: psutil.Process(self.pid).status() == status, f"the host is {status}")

    def connect(self, **options: object) -> TcpDirectory:
        return connect(self.port, self.job, **options)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.end()


@pytest.fixture
def host(nursery: Nursery) -> Host:
    pid, port = nursery.ask("host").split()
    return Host(int(pid), int(port), uuid.uuid4().hex)


def connect(port: int, job: str = "job", **options: object) -> TcpDirectory:
    settings = {"timeout": 5.0, "is_host": False, **options}
    return TcpDirectory.open("localhost", port, job, LIMIT_S, **settings)  # type: ignore[arg-type]


def seconds_to_fail(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    with pytest.raises(DirectoryError, match=r"store at localhost:\d+ failed .*start the job again"):
        call()
    return time.monotonic() - begun


CALLS: dict[str, Callable[[TcpDirectory], object]] = {
    "newest": lambda directory: directory.newest(),
    "claim": lambda directory: directory.claim(LEADER),
    "beat": lambda directory: directory.beat(1, 1),
    "last_beat": lambda directory: directory.last_beat(1),
    "end": lambda directory: directory.end("succeeded"),
    "verdict": lambda directory: directory.verdict(),
}


def test_when_the_host_dies_every_call_fails_at_once_and_so_does_a_wait(host: Host) -> None:
    with ExitStack() as stack:
        directory, other = (stack.enter_context(closing(host.connect())) for _ in range(2))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        waiting = pool.submit(seconds_to_fail, lambda: other.wait_newer(0, 60))
        assert not wait([waiting], 0.2).done
        host.kill()
        assert max(seconds_to_fail(functools.partial(call, directory)) for call in CALLS.values()) < LIMIT_S
        assert waiting.result(20) < 0.2 + LIMIT_S


def test_when_the_host_is_stopped_every_call_fails_within_its_limit(host: Host) -> None:
    with ExitStack() as stack:
        directories = [stack.enter_context(closing(host.connect())) for _ in CALLS]
        pool = stack.enter_context(ThreadPoolExecutor(len(CALLS)))
        host.stop()
        calls = [functools.partial(call, d) for call, d in zip(CALLS.values(), directories, strict=True)]
        assert max(pool.map(seconds_to_fail, calls)) < LIMIT_S + 0.5


def test_when_the_host_is_stopped_a_wait_fails_within_one_limit_and_a_second(host: Host) -> None:
    with closing(host.connect()) as directory, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(seconds_to_fail, lambda: directory.wait_newer(0, 60))
        assert not wait([waiting], 0.2).done
        host.stop()
        assert waiting.result(20) < 0.2 + LIMIT_S + 1.5


def test_when_the_host_goes_on_so_do_the_calls(host: Host) -> None:
    with closing(host.connect()) as directory:
        host.stop()
        seconds_to_fail(lambda: directory.claim(LEADER))
        host.go_on()
        assert directory.claim(LEADER)
        assert directory.newest() == LEADER


def test_a_process_with_a_call_that_never_comes_back_can_end(host: Host, nursery: Nursery) -> None:
    assert nursery.ask(f"stuck {host.port} {host.pid}") == "failed as it should"
    assert nursery.read() == "0"


def test_the_first_agent_on_the_endpoints_machine_hosts_and_the_next_one_connects() -> None:
    (port,) = free_ports(1)
    with closing(connect(port, is_host=None)) as first, closing(connect(port, is_host=None)) as second:
        assert (first.hosts, second.hosts) == (True, False)
        assert first.claim(LEADER)
        assert second.newest() == LEADER


def test_the_host_gets_the_first_term_though_another_agent_asks_sooner() -> None:
    with ExitStack() as stack:
        host = stack.enter_context(closing(connect(0, is_host=True)))
        other = stack.enter_context(closing(connect(int(host.endpoint.rsplit(":", 1)[1]))))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        asking = pool.submit(other.claim, Leader(1, "other", "b:1"))
        assert not wait([asking], 0.1).done
        assert host.claim(LEADER)
        assert not asking.result(20)
        assert other.newest() == LEADER


def test_jobs_with_other_ids_do_not_meet_in_one_store() -> None:
    with closing(connect(0, is_host=True)) as one:
        assert one.claim(LEADER)
        port = int(one.endpoint.rsplit(":", 1)[1])
        with closing(TcpDirectory.open("localhost", port, "other", 1.0, timeout=5.0, is_host=False)) as other:
            assert other.newest() is None


def test_an_agent_waits_for_the_host_to_come_up() -> None:
    (port,) = free_ports(1)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(connect, port, timeout=60.0)
        assert not wait([opening], 0.2).done
        with closing(connect(port, is_host=True)), closing(opening.result(60)) as directory:
            assert directory.newest() is None


def test_without_a_host_opening_fails_in_time_and_says_what_to_check() -> None:
    (port,) = free_ports(1)
    begun = time.monotonic()
    with pytest.raises(DirectoryError, match=f"No rendezvous store answered at localhost:{port} within 1 s"):
        connect(port, timeout=1.0)
    assert time.monotonic() - begun < 1.0 + LIMIT_S + 0.5


def test_one_who_must_host_but_cannot_says_so(host: Host) -> None:
    with pytest.raises(DirectoryError, match="No rendezvous store can be opened at .*give a free port"):
        host.connect(is_host=True)


def test_a_host_elsewhere_needs_a_port() -> None:
    with pytest.raises(
        DirectoryError, match="port of localhost is not known; give --rdzv-endpoint HOST:PORT"
    ):
        connect(0)


def test_the_store_is_gone_when_its_host_closes_even_while_it_waits() -> None:
    host = connect(0, is_host=True)
    port = int(host.endpoint.rsplit(":", 1)[1])
    with closing(connect(port)) as other:
        assert host.wait_newer(0, 0.1) is None
        host.close()
        seconds_to_fail(lambda: other.wait_newer(0, 60))


def test_the_threads_of_a_closed_directory_end(host: Host) -> None:
    before = len(os.listdir("/proc/self/task"))
    directory = host.connect()
    directory.newest()
    directory.close()
    task = Path("/proc/self/task")
    deadline = time.monotonic() + 10
    while len(list(task.iterdir())) > before and time.monotonic() < deadline:
        os.sched_yield()
    assert len(list(task.iterdir())) <= before
