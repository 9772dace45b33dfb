"""Hosts in network namespaces: what reaches whom, what is left behind, and plain torchrun on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import etcd, hosts
from harness.cluster import Cluster, start
from harness.hosts import NAMESPACES, Host, Hosts, HostsError
from harness.job import TORCHRUN, Job, Plan
from harness.steps import progress
from harness.weights import folder_differences

REASON = hosts.supported()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

ECHO = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("listening", flush=True)
while True:
    peer, _ = server.accept()
    try:
        while data := peer.recv(65536):
            peer.sendall(data)
    except OSError:
        pass
"""
# One byte after the other; each line says what came of it, and after how many milliseconds. The bytes differ, as
# the late answer to the one before may come first.
TALK = """
import itertools, socket, sys, time
peer = socket.create_connection((sys.argv[1], 7000), timeout=0.3)
for number in itertools.count():
    start = time.monotonic()
    byte = bytes([number % 256])
    try:
        peer.sendall(byte)
        while (answer := peer.recv(1)) not in (byte, b""):
            pass
        word = "answer" if answer else "closed"
    except TimeoutError:
        word = "silence"
    except OSError as error:
        word = type(error).__name__
    print(word, (time.monotonic() - start) * 1e3, flush=True)
    if word not in ("answer", "silence"):
        break
    time.sleep(0.01)
"""


def wait_for(ready: Callable[[], object], timeout: float = 20) -> None:
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end, f"not within {timeout:g} s"
        time.sleep(0.01)


class Talk:
    """A connection from one host to another that is used all the time."""

    def __init__(self, source: Host, target: Host, folder: Path) -> None:
        self.log = folder / "talk.log"
        self.server = listen(target, folder)
        self.client = source.run([sys.executable, "-c", TALK, target.address], log=self.log)

    def next(self, word: str, skip: int = 2) -> float:
        """Waits for a line with the word, beyond the next ones, and returns its milliseconds."""
        seen = len(self._lines()) + skip
        wait_for(lambda: any(line.startswith(word) for line in self._lines()[seen:]))
        line = next(line for line in self._lines()[seen:] if line.startswith(word))
        return float(line.split()[1])

    def _lines(self) -> list[str]:
        return self.log.read_text().split("\n")[:-1] if self.log.exists() else []


def listen(host: Host, folder: Path) -> subprocess.Popen[bytes]:
    log = folder / f"echo-{host.name}.log"
    log.unlink(missing_ok=True)
    server = host.run([sys.executable, "-c", ECHO], log=log)
    wait_for(lambda: log.exists() and "listening" in log.read_text())
    return server


@pytest.fixture
def three() -> Iterator[Hosts]:
    with Hosts(3) as made:
        yield made


def test_a_host_has_a_name_an_address_and_shared_memory_of_its_own(three: Hosts, tmp_path: Path) -> None:
    code = "import os, socket; open('/dev/shm/mine', 'x'); "
    code += "print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), os.listdir('/dev/shm'))"
    for host in three:
        log = tmp_path / host.name
        assert host.run([sys.executable, "-c", code], log=log).wait(20) == 0, log.read_text()
        assert log.read_text() == f"{host.name} {host.address} ['mine']\n"
    assert len({host.address for host in three}) == 3


def test_a_cut_host_is_silent_and_an_open_connection_goes_on_when_it_is_healed(
    three: Hosts, tmp_path: Path
) -> None:
    talk = Talk(three[0], three[1], tmp_path)
    talk.next("answer")
    three[1].cut()
    talk.next("silence")
    assert talk.server.poll() is None
    three[1].heal()
    talk.next("answer")


def test_a_cut_host_hears_itself_and_the_others_hear_each_other(three: Hosts, tmp_path: Path) -> None:
    three[2].cut()
    Talk(three[0], three[1], tmp_path).next("answer")
    (tmp_path / "own").mkdir()
    Talk(three[2], three[2], tmp_path / "own").next("answer")


def test_a_killed_host_falls_silent_instead_of_closing_its_connections(three: Hosts, tmp_path: Path) -> None:
    talk = Talk(three[0], three[1], tmp_path)
    talk.next("answer")
    three[1].kill()
    assert talk.server.poll() == -signal.SIGKILL
    assert not three[1].is_on
    talk.next("silence")
    with pytest.raises(HostsError, match="switched off"):
        three[1].run(["true"])


def test_a_killed_host_that_is_on_again_knows_no_old_connection(three: Hosts, tmp_path: Path) -> None:
    talk = Talk(three[0], three[1], tmp_path)
    talk.next("answer")
    three[1].kill()
    three[1].heal()
    assert three[1].processes() == []
    talk.next("ConnectionResetError", skip=0)
    (tmp_path / "new").mkdir()
    Talk(three[2], three[1], tmp_path / "new").next("answer")


def test_delay_and_loss_come_and_go(three: Hosts, tmp_path: Path) -> None:
    talk = Talk(three[0], three[1], tmp_path)
    wait_for(lambda: talk.next("answer") < 30)  # the machine may be busy
    three[0].delay(15)
    wait_for(lambda: talk.next("answer") >= 30)  # a word may have been under way
    three[0].delay(0, loss_percent=100)
    talk.next("silence")
    three[0].delay(0)
    wait_for(lambda: talk.next("answer") < 30)


def test_signals_reach_all_of_a_program(three: Hosts) -> None:
    child = three[0].run(["sh", "-c", "sleep 100 & sleep 100"])
    wait_for(lambda: len(three[0].processes()) == 3)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM
    wait_for(lambda: not three[0].processes())


def test_a_process_is_found_on_its_host(three: Hosts) -> None:
    child = three[1].run(["sleep", "100"])
    wait_for(lambda: three.where(child.pid) is not None)
    assert three.where(child.pid) is three[1]
    assert three.where(os.getpid()) is None


def test_a_program_that_has_just_been_started_is_killed_with_its_host(
    three: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "ip"  # enters the namespace after a while
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which("ip", path=hosts._path())} "$@"\n')
    slow.chmod(0o755)
    with monkeypatch.context() as before:
        before.setattr(hosts, "_inside", lambda namespace: [str(slow), "netns", "exec", namespace])
        child = three[0].run(["sleep", "100"])
    three[0].kill()
    assert child.poll() == -signal.SIGKILL


def left_of(hosts: Hosts) -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"{hosts.label}-*")]


def test_nothing_is_left_after_an_exception() -> None:
    made = Hosts(2)

    def fail() -> None:
        with made:
            made[0].run(["sleep", "100"])
            made[1].cut()
            assert len(left_of(made)) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left_of(made) == []


# It looks up ten times a second: a signal that comes just before a call blocks is seen when the call returns.
OWNER = """
import select, sys
sys.path.insert(0, {folder!r})
from harness.hosts import Hosts
with Hosts(2) as hosts:
    print(hosts.label, hosts[0].run(["sleep", "100"]).pid, flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
"""


class Owner:
    """A process that has hosts, and a process on one of them, until it is ended."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", OWNER.format(folder=str(BENCHMARKS))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.label, pid = self.process.stdout.readline().split()
        self.inmate = int(pid)

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def left(self) -> list[Path]:
        return list(NAMESPACES.glob(f"{self.label}-*"))


def test_nothing_is_left_after_an_interrupt() -> None:
    owner = Owner()
    assert len(owner.left()) == 3
    owner.end(signal.SIGINT)
    assert not owner.left()
    assert not _runs(owner.inmate)


def test_what_a_killed_owner_left_is_swept_away_and_what_a_living_one_has_is_not() -> None:
    dead, living = Owner(), Owner()
    dead.end(signal.SIGKILL)
    hosts.sweep()
    assert not dead.left()
    assert not _runs(dead.inmate)
    assert len(living.left()) == 3
    living.end(signal.SIGINT)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(bool(etcd.supported()), reason=etcd.supported())
def test_three_etcd_members_do_without_a_host_and_take_it_back(three: Hosts, tmp_path: Path) -> None:
    for host in three:
        etcd.start(host, list(three), tmp_path)
    for host in three:
        etcd.wait_ready(host, tmp_path)
    three[2].kill()
    wait_for(lambda: put(three[0], "key", "value"))
    three[2].heal()
    etcd.start(three[2], list(three), tmp_path)
    wait_for(lambda: put(three[2], "key", "newer"))


def put(host: Host, key: str, value: str) -> bool:
    """Whether the member on this host wrote it, by etcd's HTTP gateway."""
    fields = {name: b64encode(text.encode()).decode() for name, text in (("key", key), ("value", value))}
    code = "import sys, urllib.request as r; r.urlopen(sys.argv[1], sys.argv[2].encode(), timeout=3).read()"
    url = f"http://{etcd.endpoint([host])}/v3/kv/put"
    return host.run([sys.executable, "-c", code, url, json.dumps(fields)], log=Path(os.devnull)).wait(20) == 0


def small(folder: Path, nodes: int = 1, steps: int = 8) -> Plan:
    environment = {"BENCH_WIDTH": "64"}
    script = BENCHMARKS / "jobs" / "ddp.py"
    return Plan(TORCHRUN, script, folder, 6, steps, nodes=nodes, environment=environment)


@pytest.mark.slow
def test_plain_torchrun_on_three_hosts_ends_as_on_one_machine(tmp_path: Path) -> None:
    with start(small(tmp_path / "one")) as job, start(small(tmp_path / "three", 3)) as cluster:
        assert isinstance(job, Job)
        assert isinstance(cluster, Cluster)
        job.finish(120)
        cluster.until(lambda: progress(cluster.plan.folder, 6) >= 0)
        where = {rank: node.number for rank, node in cluster.placement().items()}
        cluster.finish(120)
    assert folder_differences(tmp_path / "one", tmp_path / "three", 6) == []
    assert all(len([rank for rank, node in where.items() if node == number]) <= 2 for number in range(3))


@pytest.mark.slow
def test_plain_torchrun_ends_well_over_a_bad_cable(tmp_path: Path) -> None:
    with Cluster(small(tmp_path / "bad", 3, steps=4)) as cluster:
        cluster.hosts[1].delay(5, jitter=1, loss_percent=1)
        cluster.finish(240)
    assert progress(tmp_path / "bad", 6) == 3
