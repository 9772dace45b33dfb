"""How jobs end: exit codes, summaries, restarts, signals; and what is left behind, which is nothing."""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests.conftest import Finished, Launcher, run_dirs, wait_until

WAIT = """
    import os, pathlib, signal, sys
    with open("pids", "a") as file:
        file.write(f"{os.environ['RANK']} {os.getpid()}\\n")
    signal.pause()
"""


def summary(finished: Finished) -> list[tuple[str, ...]]:
    """(rank, local rank, exit code, signal) of each failure in torchrun's summary, the root cause last."""
    text = finished.err[finished.err.index(" FAILED\n") :]
    return re.findall(
        r"rank +: (\d+) \(local_rank: (\d+)\)\n *exitcode +: (-?\d+) \(pid: \d+\) *(\(\w+\))?", text
    )


def root_message(finished: Finished) -> str:
    return finished.err[finished.err.index("Root Cause (first observed failure):") :]


@pytest.mark.parametrize("backend", [pytest.param("c10d", marks=pytest.mark.slow), "checkpointless"])
def test_an_exit_code_is_reported(torchrun: Launcher, backend: str) -> None:
    torchrun.script("import os, signal, sys; sys.exit(3) if os.environ['RANK'] == '1' else signal.pause()")
    finished = torchrun.run("train.py", backend=backend)
    assert finished.code == 1
    assert summary(finished) == [("0", "0", "-15", "(SIGTERM)"), ("1", "1", "3", "")]


@pytest.mark.parametrize("backend", ["c10d", "checkpointless"])
def test_a_killed_worker_is_the_root_cause(torchrun: Launcher, backend: str) -> None:
    torchrun.script(
        "import os, signal; os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else signal.pause()"
    )
    finished = torchrun.run("train.py", backend=backend)
    assert finished.code == 1
    assert summary(finished) == [("1", "1", "-15", "(SIGTERM)"), ("0", "0", "-9", "(SIGKILL)")]
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID \d+", root_message(finished))


@pytest.mark.slow
def test_the_first_failure_is_named_although_others_follow(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, signal, sys
        def leave(*_): sys.exit(5)
        signal.signal(signal.SIGTERM, leave)
        open(f"up.{os.environ['RANK']}", "w")
        while not all(os.path.exists(f"up.{rank}") for rank in range(3)): os.sched_yield()
        if os.environ["RANK"] == "2": raise ValueError("the first one")
        while True: signal.pause()
        """
    )
    finished = torchrun.run("train.py", ranks=3)
    assert summary(finished)[-1] == ("2", "2", "1", "")
    assert {failure[2] for failure in summary(finished)[:-1]} == {"5"}
    assert "ValueError: the first one" in root_message(finished)


@pytest.mark.parametrize("recorded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exception_leaves_an_error_file_with_the_users_traceback(
    torchrun: Launcher, recorded: bool
) -> None:
    decorator = "@record" if recorded else ""
    torchrun.script(
        f"""
        from torch.distributed.elastic.multiprocessing.errors import record
        {decorator}
        def main():
            raise KeyError("lost it")
        main()
        """
    )
    finished = torchrun.run("--log-dir", "logs", "train.py", ranks=1)
    assert finished.code == 1
    (file,) = (torchrun.folder / "logs").rglob("error.json")
    error = json.loads(file.read_text())["message"]
    assert error["message"] == "KeyError: 'lost it'"
    assert 'raise KeyError("lost it")' in error["extraInfo"]["py_callstack"]
    assert "bootstrap" not in error["extraInfo"]["py_callstack"]
    assert "bootstrap" not in finished.err
    assert "KeyError: 'lost it'" in root_message(finished)


def test_a_script_that_fails_once_succeeds_after_the_restart_and_gloo_works_again(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
        open(f"ran.{rank}.{count}", "w").write(str(total.item()))
        if count == "0" and rank == "1":
            os._exit(7)
        dist.all_reduce(total)
        dist.destroy_process_group()
        """
    )
    finished = torchrun.run("--max-restarts", "1", "--log-dir", "logs", "train.py")
    assert finished.code == 0, finished.err
    assert "All workers are restarted (restart 1): " in finished.err
    assert {p.name: p.read_text() for p in torchrun.folder.glob("ran.*")} == {
        f"ran.{rank}.{count}": "2.0" for rank in range(2) for count in range(2)
    }
    assert {path.name for path in (torchrun.folder / "logs").glob("*/attempt_*")} == {
        "attempt_0",
        "attempt_1",
    }


def test_without_a_restart_left_the_job_fails_and_says_so(torchrun: Launcher) -> None:
    torchrun.script("import sys; open('ran', 'a').write('x'); sys.exit(4)")
    finished = torchrun.run("--max-restarts", "2", "train.py", ranks=1)
    assert finished.code == 1
    assert "no restart is left (--max-restarts is 2) and one is needed: " in finished.err
    assert (torchrun.folder / "ran").read_text() == "xxx"


@pytest.mark.slow
def test_a_worker_that_ignores_sigterm_does_not_stop_a_restart(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, signal, sys
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1": sys.exit(0)
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open("deaf", "w")
            while True: signal.pause()
        while not os.path.exists("deaf"): os.sched_yield()
        sys.exit(1)
        """
    )
    finished = torchrun.run("--max-restarts", "1", "--shutdown-timeout", "1", "train.py")
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_stops_everything(torchrun: Launcher, number: signal.Signals) -> None:
    torchrun.script(WAIT)
    job = torchrun.start("train.py")
    job.expect_lines("pids", 2)
    assert len(run_dirs(job.pid)) == 1
    job.process.send_signal(number)
    finished = job.finish()
    assert finished.code == 1
    assert f"got signal: {int(number)}" in finished.err
    assert torchrun.leftovers() == []


@pytest.mark.slow
def test_a_worker_may_end_in_its_own_way_on_sigterm(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, signal, sys
        def save(*_):
            open("saved", "w")
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        open("pids", "w").write("up\\n")
        while True: signal.pause()
        """
    )
    job = torchrun.start("train.py", ranks=1)
    job.expect_lines("pids", 1)
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    assert (torchrun.folder / "saved").exists()


def test_sigkill_to_torchrun_leaves_no_process_and_no_directory(torchrun: Launcher) -> None:
    torchrun.script(WAIT)
    job = torchrun.start("train.py")
    job.expect_lines("pids", 2)
    job.process.send_signal(signal.SIGKILL)
    job.finish()
    wait_until(lambda: not torchrun.leftovers(), "all workers and the run directory are gone")


def test_a_dead_fork_server_takes_its_workers_along_and_the_job_restarts(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, signal, sys
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1": sys.exit(0)
        open("pids", "a").write(f"{os.getppid()}\\n")
        while True: signal.pause()
        """
    )
    job = torchrun.start("--max-restarts", "1", "train.py")
    (server,) = set(job.expect_lines("pids", 2))
    import os

    os.kill(int(server), signal.SIGKILL)
    finished = job.finish()
    assert finished.code == 0, finished.err
    assert "its workers end too" in finished.err


@pytest.mark.slow
def test_what_a_killed_worker_leaves_behind_is_killed_with_it(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, signal, subprocess, sys
        subprocess.Popen(["sleep", "1000"])
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert torchrun.run("train.py", ranks=1).code == 1


@pytest.mark.slow
def test_a_script_that_ends_well_may_leave_a_helper_running(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import subprocess
        helper = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        open("helper", "w").write(str(helper.pid))
        """
    )
    job = torchrun.start("train.py", ranks=1)
    assert job.finish().code == 0
    helpers = [process for process in job.members() if process.name() == "sleep"]
    assert [str(helper.pid) for helper in helpers] == [(torchrun.folder / "helper").read_text()]
    for helper in helpers:
        helper.kill()
