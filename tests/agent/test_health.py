"""Whether a node is fit for workers: each check on a thing that is really wrong, and a job that is told so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.health import ANSWER_LIMIT_S, Health, disk, loopback, memory
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.worker.health import why_broken
from tests.agent.frozen import frozen_disk
from tests.conftest import Launcher, wait_until


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def frozen() -> Iterator[Path]:
    """A file system on which whatever writes waits, as on a server that is gone."""
    with frozen_disk() as folder:
        yield folder


def answers(health: Health, loop: EventLoop, count: int = 1) -> list[str]:
    found: list[str] = []
    for _ in range(count):
        health.check(found.append)
    assert loop.run(lambda: len(found) == count, 20.0)
    return found


def health_of(loop: EventLoop, command: str, *folders: str | Path, limit: float = ANSWER_LIMIT_S) -> Health:
    return Health(loop, Bell(loop), command, lambda: list(map(str, folders)), limit)


def test_a_machine_in_order_passes_what_is_built_in(loop: EventLoop, tmp_path: Path) -> None:
    assert answers(health_of(loop, "", tmp_path, ""), loop) == [""]


def test_a_folder_in_which_nothing_can_be_written_is_named(loop: EventLoop, tmp_path: Path) -> None:
    (found,) = answers(health_of(loop, "true", tmp_path, tmp_path / "none"), loop)
    assert found == f"{tmp_path}/none cannot be written (No such file or directory)"


def test_a_file_system_that_does_not_answer_makes_the_node_unfit_and_the_loop_serves_others(
    loop: EventLoop, frozen: Path
) -> None:
    health = health_of(loop, "true", frozen, limit=0.5)
    fired: list[float] = []
    loop.call_later(0.0, lambda: fired.append(time.monotonic()))
    for _ in range(2):
        assert answers(health, loop) == [f"nothing can be written in {frozen} within 0 s"]
    assert fired


def test_too_little_memory() -> None:
    assert "MiB of memory are available" in memory(least=1 << 60)


def test_a_full_disk(small_disk: Path) -> None:
    assert disk(str(small_disk)) == ""
    (small_disk / "filler").write_bytes(bytes(6 << 20))
    assert f"{small_disk} has only 2048 KiB left, under 4096 KiB" in disk(str(small_disk))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "more").write_bytes(bytes(6 << 20))
    assert disk(str(small_disk)) == f"{small_disk} cannot be written (No space left on device)"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be written (No such file" in disk(str(tmp_path / "none"))


def test_a_machine_without_its_loopback() -> None:
    assert loopback() == ""
    program = "from checkpointless_elastic.agent.health import loopback; print(loopback())"
    cut_off = ["unshare", "--net", sys.executable, "-c", program]
    done = subprocess.run(cut_off, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip(f"cannot take the network away: {done.stderr.strip()}")
    assert "this machine cannot connect to itself over TCP" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("true", ""),
        ("echo all well; echo really >&2", ""),
        ("echo first; echo the last line; echo; exit 3", "says: the last line"),
        ("exit 3", "says: exited with code 3"),
        ("kill -9 $$", "says: exited with code -9"),
        ("/nowhere/at/all", "not found"),
        ("head -c 300000 /dev/zero | tr '\\0' x; echo; echo enough; false", "says: enough"),
        ("sleep 60 & exit 0", ""),
    ],
)
def test_a_command_of_the_users_says_whether_the_node_is_fit(
    command: str, reason: str, loop: EventLoop
) -> None:
    (found,) = answers(health_of(loop, command), loop)
    assert found.endswith(reason) and bool(found) == bool(reason)


def test_who_asks_while_the_command_runs_gets_the_same_answer(loop: EventLoop, tmp_path: Path) -> None:
    command = f"echo run >> {tmp_path}/runs; sleep 0.2; echo bad; exit 1"
    assert len(set(answers(health_of(loop, command), loop, count=3))) == 1
    assert (tmp_path / "runs").read_text() == "run\n"


def test_a_command_that_gives_no_answer_is_ended_with_what_it_started(
    loop: EventLoop, tmp_path: Path
) -> None:
    health = health_of(loop, f"sleep 70 & echo $! > {tmp_path}/child; wait", limit=0.5)
    (found,) = answers(health, loop)
    assert found.endswith("gave no answer within 0 s")
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not _runs(child), "its child is gone")


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_loop_serves_others_while_the_command_runs(loop: EventLoop) -> None:
    fired: list[float] = []
    loop.call_later(0.0, lambda: fired.append(time.monotonic()))
    answers(health_of(loop, "sleep 0.3"), loop)
    assert fired


def test_nobody_is_answered_after_the_end(loop: EventLoop) -> None:
    health = health_of(loop, "sleep 60")
    health.check(lambda reason: pytest.fail(reason))
    health.close()
    assert not loop.run(lambda: False, 0.0)


# ---- devices


def test_a_device_that_computes() -> None:
    assert why_broken(torch.device("cpu")) == ""


def test_a_device_that_gives_no_numbers_is_named() -> None:
    assert why_broken(torch.device("mps")).startswith("mps does not compute (")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_that_computes() -> None:
    assert why_broken(torch.device("cuda", 0)) == ""


# ---- jobs

SCRIPT = """
    import os, signal
    import torch
    import checkpointless_elastic as ce
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = ce.Run(model=model, optimizer=optimizer)

    @run.replayable
    def step():
        model(torch.ones(1, 2)).sum().backward()
        if run.step == 3 and os.environ["RANK"] == "1" and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()

    torch.distributed.init_process_group("gloo")
    for number in run.steps(6):
        step()
    torch.distributed.destroy_process_group()
"""


def test_a_node_that_is_not_fit_when_it_comes_runs_no_worker_and_says_why(torchrun: Launcher) -> None:
    script = torchrun.script("open('ran', 'w').close()")
    done = torchrun.run(
        script, env={"CHECKPOINTLESS_HEALTH_CHECK": "echo the fan has stopped; exit 1"}, ranks=1
    )
    assert done.code == 1
    assert "This node is not fit to run workers: the health check" in done.err
    assert "traceback : This node is not fit" in done.err and "says: the fan has stopped." in done.err
    assert not (torchrun.folder / "ran").exists()


@pytest.mark.slow
def test_a_lost_worker_is_not_replaced_on_a_node_that_is_not_fit_any_more(torchrun: Launcher) -> None:
    command = "test ! -e died || { echo the fan has stopped; exit 1; }"
    done = torchrun.run(torchrun.script(SCRIPT), env={"CHECKPOINTLESS_HEALTH_CHECK": command})
    assert done.code == 1, done.err
    assert (
        "traceback : This node is not fit to run workers" in done.err
        and "says: the fan has stopped." in done.err
    )


@pytest.mark.slow
def test_a_lost_worker_is_replaced_where_the_command_finds_the_node_fit(torchrun: Launcher) -> None:
    command = "echo asked >> asked"
    done = torchrun.run(torchrun.script(SCRIPT), env={"CHECKPOINTLESS_HEALTH_CHECK": command})
    assert done.code == 0, done.err
    assert (
        torchrun.folder / "asked"
    ).read_text() == "asked\nasked\n"  # at the start, and for the replacement
    assert "lost rank 1 at step 3" in done.err


@pytest.mark.slow
def test_a_replacement_whose_device_does_not_work_ends_its_nodes_part(torchrun: Launcher) -> None:
    """No GPU is broken here: the answer of the question to the device is replaced."""
    broken = """
    from checkpointless_elastic.worker import recovery
    recovery.broken_device = lambda: "cuda:0 does not compute (an illegal instruction)"
    """
    done = torchrun.run(torchrun.script(textwrap.dedent(broken) + textwrap.dedent(SCRIPT)))
    assert done.code == 1, done.err
    assert "traceback : This node is not fit to run workers: cuda:0 does not compute (an illegal" in done.err
