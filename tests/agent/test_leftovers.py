"""However a job ends, and whoever is killed: no process, socket, shared memory or temporary file of it is left.

The job is in the middle of training, with loader processes, mirrors of each step, and segments for a transfer.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from checkpointless_elastic.run_dir import RunDir
from tests.agent.traces import Traces
from tests.conftest import run_dirs, wait_until
from tests.directory.etcd_server import has_etcd, skip_without_etcd, start_etcd
from tests.nodes.cluster import Agent, Nodes

SCRIPT = Path(__file__).with_name("job_leftovers.py")
LIMIT_S = 90.0
GONE_S = 20.0
"""A loader process whose worker was killed looks for it every 5 s; our own parts end at once."""


@dataclass
class Place:
    """One job and all traces of it."""

    nodes: Nodes
    traces: Traces
    agents: list[Agent] = field(default_factory=list)

    def start(self, count: int = 1, **env: str) -> None:
        self.nodes.env |= env
        self.agents = self.nodes.start(count)

    def await_steps(self, more: int = 8) -> None:
        """Until that many more lines are written."""
        wanted = len(self.lines()) + more
        self.await_that(lambda: len(self.lines()) >= wanted, f"{wanted} steps")

    def await_line(self, line: str) -> None:
        self.await_that(lambda: line in self.lines(), f"the line {line!r}")

    def await_that(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(lambda: condition() or not self.nodes.running(), what, LIMIT_S)
        self.traces.look()
        assert condition(), f"{what}\n{self.nodes.text}"

    def lines(self) -> list[str]:
        path = self.nodes.folder / "steps"
        return path.read_text().splitlines() if path.exists() else []

    def signal(self, number: signal.Signals) -> None:
        for agent in self.agents:
            agent.process.send_signal(number)

    def servers(self) -> list[psutil.Process]:
        """The fork servers of all agents."""
        return [child for agent in self.agents for child in psutil.Process(agent.pid).children()]

    def finish(self) -> list[int | None]:
        """The exit codes of all agents, when all have ended."""
        wait_until(lambda: not self.nodes.running(), "all agents have ended", LIMIT_S)
        return self.nodes.codes

    def check(self) -> None:
        wait_until(lambda: not self.traces.left(), "nothing is left of the job", GONE_S)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for that of a socket; torch makes some there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def place(tmp_path: Path, short: Path) -> Iterator[Place]:
    options = (
        "--rdzv-conf",
        "mirror_every=1,on_loss=fail",
        "--max-restarts=0",
        "--log-dir",
        str(tmp_path / "logs"),
    )
    nodes = Nodes(
        tmp_path / "job", "1", workers=2, script=SCRIPT, options=options, env={"TMPDIR": str(short)}
    )
    made = Place(nodes, Traces(nodes.mark, short))
    try:
        yield made
        left = made.traces.left()
        assert not left, f"{left}\n{nodes.text}"
    finally:
        nodes.kill()


def succeed(place: Place) -> None:
    place.start(STEPS="8")
    place.await_steps()
    assert place.finish() == [0]


def recover_and_succeed(place: Place) -> None:
    place.start(STEPS="8", DIE="1:3:kill")
    place.await_line("joining")
    assert place.finish() == [0]


def fail(place: Place) -> None:
    place.start(DIE="1:5:raise")
    place.await_steps()
    assert place.finish() == [1]


def be_told(number: signal.Signals) -> Callable[[Place], None]:
    def end(place: Place) -> None:
        place.start()
        place.await_steps()
        place.signal(number)
        assert place.finish() == [1 if number is not signal.SIGKILL else -number]

    return end


def be_told_twice(place: Place) -> None:
    place.start()
    place.await_steps()
    place.signal(signal.SIGTERM)
    place.signal(signal.SIGTERM)
    place.finish()


def lose_the_whole_group(place: Place) -> None:
    place.start()
    place.await_steps()
    os.killpg(place.agents[0].pid, signal.SIGKILL)
    assert place.finish() == [-signal.SIGKILL]


def lose_the_fork_server(place: Place) -> None:
    place.start()
    place.await_steps()
    old = [process for process in place.traces.processes if process.pid not in (place.agents[0].pid,)]
    for server in place.servers():
        server.kill()
    place.await_steps()
    assert not [process for process in old if process.is_running()]
    place.signal(signal.SIGTERM)
    assert place.finish() == [1]


def lose_agent_and_fork_server(place: Place) -> None:
    """Nobody is left to remove the run directory; the next agent does."""
    place.start()
    place.await_steps()
    for process in (*place.servers(), psutil.Process(place.agents[0].pid)):
        process.kill()
    place.finish()
    wait_until(
        lambda: all(line.startswith("file /dev/shm/") for line in place.traces.left()),
        "the processes' end",
        GONE_S,
    )
    RunDir().remove()  # any job that began meanwhile has done so already


def before_the_first_worker(number: signal.Signals) -> Callable[[Place], None]:
    def end(place: Place) -> None:
        place.start()
        place.await_that(lambda: bool(run_dirs(place.agents[0].pid)), "the run directory")
        place.signal(number)
        place.finish()

    return end


def in_a_recovery(number: signal.Signals) -> Callable[[Place], None]:
    def end(place: Place) -> None:
        place.start(DIE="1:3:kill", HOLD="1")
        place.await_line("joining")
        place.signal(number)
        place.finish()

    return end


def with_a_manager_of_shared_memory(place: Place) -> None:
    """The other way in which torch's loader processes hand tensors over: files, and a process that removes them."""
    place.start(STRATEGY="file_system", DIE="1:3:kill")
    place.await_line("joining")
    place.await_steps()
    place.signal(signal.SIGKILL)
    place.finish()


def lose_one_agent_of_two(place: Place) -> None:
    place.nodes.nodes, place.nodes.workers = "2", 1
    place.start(2)
    place.await_steps()
    place.agents[1].process.kill()
    assert place.finish() == [1, -signal.SIGKILL]


def tell_both_agents(place: Place) -> None:
    place.nodes.nodes, place.nodes.workers = "2", 1
    place.start(2)
    place.await_steps()
    place.signal(signal.SIGTERM)
    place.finish()


ENDS = {
    "SIGKILL of the agent": be_told(signal.SIGKILL),
    "success": succeed,
    "success after a recovery": recover_and_succeed,
    "an error of the script": fail,
    "SIGTERM": be_told(signal.SIGTERM),
    "SIGINT": be_told(signal.SIGINT),
    "SIGHUP": be_told(signal.SIGHUP),
    "SIGTERM twice": be_told_twice,
    "SIGKILL of torchrun's process group": lose_the_whole_group,
    "SIGKILL of the fork server": lose_the_fork_server,
    "SIGKILL of agent and fork server": lose_agent_and_fork_server,
    "SIGKILL before the first worker": before_the_first_worker(signal.SIGKILL),
    "SIGTERM before the first worker": before_the_first_worker(signal.SIGTERM),
    "SIGKILL in a recovery": in_a_recovery(signal.SIGKILL),
    "SIGTERM in a recovery": in_a_recovery(signal.SIGTERM),
    "shared memory with a manager": with_a_manager_of_shared_memory,
    "one agent of two": lose_one_agent_of_two,
    "both agents": tell_both_agents,
}
DEFAULT = "SIGKILL of the agent"


@pytest.mark.parametrize(
    "end", [pytest.param(name, marks=[] if name == DEFAULT else [pytest.mark.slow]) for name in ENDS]
)
def test_nothing_is_left_after(end: str, place: Place) -> None:
    ENDS[end](place)
    place.check()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["one agent of two", "both agents"])
def test_nothing_is_left_with_etcd_after(end: str, place: Place, tmp_path: Path) -> None:
    if not has_etcd():
        skip_without_etcd()
    cluster = start_etcd(tmp_path)
    try:
        place.nodes.endpoint = cluster.endpoints[0]
        ENDS[end](place)
        place.check()
    finally:
        cluster.stop()
