"""The fork server and its successor: what it loads, what it drops, what it reports, how it ends."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from checkpointless_elastic.agent import preload
from tests.agent.nursery import Ended, Nursery, nursery
from tests.conftest import wait_until

SMALL = ("checkpointless_elastic.worker.bootstrap",)
WAIT = "import signal; print('up', flush=True); signal.pause()"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is loaded sooner than the real one."""
    monkeypatch.setattr(preload, "BASE", SMALL)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that fork servers can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def server_of(pid: int) -> int:
    return psutil.Process(pid).ppid()


def until_loaded(nest: Nursery, module: str) -> None:
    assert nest.loop.run(lambda: module in nest.servers.loaded, 60.0)


def the_last(nest: Nursery) -> psutil.Process:
    """The only server that is left in a while."""
    assert nest.loop.run(lambda: len(nest.processes) == 1, 60.0), nest.processes
    return nest.processes[0]


def test_statuses_are_exit_codes_and_negative_signals(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        assert nest.run("script", [script(tmp_path, "raise SystemExit(7)")]).status == 7
        assert nest.run("script", [script(tmp_path, "import os; os.kill(os.getpid(), 11)")]).status == -11


def test_many_children_at_once_are_all_reported(small: None, tmp_path: Path) -> None:
    path = script(tmp_path, "import os; os._exit(int(os.environ['NUMBER']))")
    with nursery(tmp_path) as nest:
        pids = [nest.start("exec", [sys.executable, path], {"NUMBER": str(number)}) for number in range(12)]
        assert [nest.finish(pid).status for pid in pids] == list(range(12))


def test_log_files_are_begun_or_continued(small: None, tmp_path: Path) -> None:
    path = script(tmp_path, "print('line')")
    log = str(tmp_path / "log")
    with nursery(tmp_path) as nest:
        for append, lines in ((False, 1), (True, 2), (True, 3), (False, 1)):
            nest.run("script", [path], stdout=log, append=append)
            assert Path(log).read_text() == "line\n" * lines


def test_a_child_can_be_bound_to_cpus(small: None, tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    with nursery(tmp_path) as nest:
        ended = nest.run(
            "script", [script(tmp_path, "import os; print(os.sched_getaffinity(0))")], cpus=[cpu]
        )
    assert ended.out == f"{{{cpu}}}\n"


def test_the_first_server_has_torch_loaded_in_one_thread(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import sys, os; print('torch' in sys.modules, len(os.listdir('/proc/self/task')))"
    )
    with nursery(tmp_path) as nest:
        assert nest.run("script", [path]).out == "True 1\n"
        assert nest.servers.loaded == list(preload.BASE)
        assert nest.servers.dropped == {}


def test_a_successor_takes_over_and_the_old_server_stays_for_its_children(
    small: None, tmp_path: Path
) -> None:
    with nursery(tmp_path) as nest:
        old = nest.start("script", [script(tmp_path, WAIT)])
        nest.servers.learn(["fractions"])
        until_loaded(nest, "fractions")
        assert nest.servers.loaded == [*SMALL, "fractions"]
        new = nest.start("script", [script(tmp_path, WAIT)])
        servers = [psutil.Process(server_of(pid)) for pid in (old, new)]
        assert servers[0].pid != servers[1].pid
        os.kill(old, signal.SIGTERM)
        assert nest.finish(old).status == -signal.SIGTERM
        assert the_last(nest) == servers[1]
        os.kill(new, signal.SIGTERM)
        nest.finish(new)
        assert servers[1].is_running()


def test_what_is_already_loaded_needs_no_successor(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        nest.servers.learn(["fractions"])
        until_loaded(nest, "fractions")
        server = the_last(nest)
        nest.servers.learn(["fractions"])
        assert nest.processes == [server]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('not today')", "its import failed with RuntimeError: not today"),
        ("raise SystemExit", "its import failed with SystemExit"),
        (
            "import threading; threading.Thread(target=threading.Event().wait).start()",
            "it leaves the process with 2 threads",
        ),
        ("import os; os.abort()", "the fork server ended with status -6 while it was loading it"),
    ],
    ids=["raises", "exits", "starts a thread", "crashes"],
)
def test_a_module_that_makes_forking_unsafe_is_dropped(
    small: None, tmp_path: Path, modules: Path, text: str, reason: str
) -> None:
    (modules / "bad.py").write_text(text + "\n")
    (modules / "good.py").write_text("")
    with nursery(tmp_path) as nest:
        nest.servers.learn(["bad", "good"])
        until_loaded(nest, "good")
        assert nest.servers.loaded == [*SMALL, "good"]
        assert nest.servers.dropped["bad"].startswith(reason)
        path = script(tmp_path, "import sys; print('good' in sys.modules, 'bad' in sys.modules)")
        assert nest.run("script", [path]) == Ended(0, "True False\n", "")


def test_a_module_that_opens_the_gpu_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "_open_files", lambda: iter(["/dev/null", "/dev/nvidiactl"]))
    assert preload.load("json") == "it opens the GPU"


def test_a_base_module_that_is_dropped_does_not_lose_requests(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (modules / "bad.py").write_text("1/0\n")
    monkeypatch.setattr(preload, "BASE", (*SMALL, "bad"))
    with nursery(tmp_path) as nest:
        assert nest.run("script", [script(tmp_path, "print('fine')")]).out == "fine\n"
        assert nest.servers.loaded == [*SMALL]


def test_a_killed_server_takes_its_children_along_and_another_one_serves(small: None, tmp_path: Path) -> None:
    parent = "import subprocess, signal; subprocess.Popen(['sleep', '1000']); print('up'); signal.pause()"
    with nursery(tmp_path) as nest:
        pids = [nest.start("script", [script(tmp_path, parent)]) for _ in range(2)]
        wait_until(lambda: all(psutil.Process(pid).children() for pid in pids), "the grandchildren are there")
        grandchildren = [child for pid in pids for child in psutil.Process(pid).children()]
        os.kill(server_of(pids[0]), signal.SIGKILL)
        assert [nest.finish(pid).status for pid in pids] == [-signal.SIGKILL] * 2
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the children are gone")
        wait_until(lambda: not any(child.is_running() for child in grandchildren), "theirs are gone too")
        assert nest.run("script", [script(tmp_path, "print('again')")]).out == "again\n"


def spare_beside(pid: int) -> int:
    """The child that waits beside this one."""
    server = psutil.Process(server_of(pid))
    wait_until(lambda: len(server.children()) == 2, "one more child waits")
    return next(child.pid for child in server.children() if child.pid != pid)


def test_the_next_worker_is_forked_ahead_and_is_as_any_other(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        waits = nest.start("script", [script(tmp_path, WAIT)])
        spare = spare_beside(waits)
        (tmp_path / "other").mkdir()
        says = script(
            tmp_path / "other", "import os, sys; print(os.environ['WORD'], sys.argv[1], os.getsid(0))"
        )
        child = nest.start("script", [says, "argument"], {"WORD": "word"})
        assert child == spare
        assert nest.finish(child).out == f"word argument {spare}\n"
        assert nest.statuses == {spare: 0}
        after = spare_beside(waits)
        program = nest.start("exec", [sys.executable, "-c", "import os; os._exit(3)"])
        assert program == after
        assert nest.finish(program).status == 3


def test_a_killed_spare_is_nobodys_loss(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        waits = nest.start("script", [script(tmp_path, WAIT)])
        spare = spare_beside(waits)
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(spare), "it is reaped")
        assert nest.run("script", [script(tmp_path, "print('fine')")]).out == "fine\n"
        assert spare not in nest.statuses
        assert spare_beside(waits) != spare


@pytest.mark.parametrize("how", ["killed", "closed", "retired"])
def test_a_spare_ends_with_its_server(small: None, tmp_path: Path, how: str) -> None:
    with nursery(tmp_path) as nest:
        waits = nest.start("script", [script(tmp_path, WAIT)])
        spare = spare_beside(waits)
        if how == "killed":
            os.kill(server_of(waits), signal.SIGKILL)
        elif how == "retired":
            nest.servers.learn(["fractions"])
            until_loaded(nest, "fractions")
            os.kill(waits, signal.SIGKILL)
            the_last(nest)
        else:
            nest.servers.close()
        wait_until(lambda: not psutil.pid_exists(spare), "the spare is gone")


def test_a_server_that_does_not_end_holds_up_nothing(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        pid = nest.start("script", [script(tmp_path, WAIT)])
        stuck = psutil.Process(server_of(pid))
        stuck.suspend()
        nest.servers.learn(["fractions"])
        until_loaded(nest, "fractions")
        fired: list[int] = []
        nest.servers._forget(
            next(one for one in nest.servers._servers if one.process.pid == stuck.pid), fired.append
        )
        assert not fired
        assert nest.run("script", [script(tmp_path, "print('fine')")]).out == "fine\n"
        assert nest.loop.run(lambda: bool(fired), 60.0)
        assert fired == [-signal.SIGKILL]
        wait_until(lambda: not psutil.pid_exists(pid), "its child is gone")


def test_a_server_that_cannot_start_is_an_error_and_not_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with nursery(tmp_path) as nest, pytest.raises(RuntimeError, match="before it loaded anything"):
        nest.run("script", ["x.py"])


def test_closing_ends_children_and_removes_the_run_directory(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        pid = nest.start("script", [script(tmp_path, WAIT)])
        nest.servers.learn(["fractions"])
        until_loaded(nest, "fractions")
        assert nest.run_dir.exists()
    wait_until(lambda: not psutil.pid_exists(pid), "the child is gone")
    assert not nest.run_dir.exists()


def test_a_retired_server_leaves_the_run_directory_alone(small: None, tmp_path: Path) -> None:
    with nursery(tmp_path) as nest:
        nest.run("script", [script(tmp_path, "print()")])
        nest.servers.learn(["fractions"])
        until_loaded(nest, "fractions")
        the_last(nest)
        assert nest.run_dir.exists()


def test_a_server_that_is_retired_while_it_loads_leaves_the_run_directory_alone(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "begun"
    slow_once = (
        f"import os, time; os.path.exists({str(begun)!r}) or (open({str(begun)!r}, 'x'), time.sleep(1))"
    )
    (modules / "slow.py").write_text(slow_once + "\n")
    (modules / "after.py").write_text("")
    monkeypatch.setattr(preload, "BASE", (*SMALL, "slow", "after"))
    with nursery(tmp_path) as nest:
        wait_until(begun.exists, "the first server is loading")
        nest.servers.learn(["fractions"])
        until_loaded(nest, "fractions")
        server = the_last(nest)
        assert nest.run_dir.exists()
        assert (
            nest.run("script", [script(tmp_path, "import os; print(os.getppid())")]).out == f"{server.pid}\n"
        )


def test_only_installed_modules_are_worth_learning() -> None:
    import numpy

    own = ModuleType("own")
    own.__file__ = "/home/someone/own.py"
    found = preload.third_party(
        {"numpy": numpy, "alias": numpy, "own": own, "__main__": sys.modules["__main__"]}
    )
    assert found == ["numpy"]
    assert "os" not in preload.third_party()


def test_another_package_or_a_large_part_of_a_known_one_is_worth_a_successor() -> None:
    parts = [f"torch.late{number}" for number in range(10)]
    assert not preload.worth_learning([], ["torch"])
    assert not preload.worth_learning(parts[:9], ["torch", "torch.nn"])
    assert preload.worth_learning(parts, ["torch", "torch.nn"])
    assert preload.worth_learning(["rich"], ["torch", "torch.nn"])


def test_a_successors_list_begins_with_its_own_modules_and_has_no_doubles() -> None:
    assert preload.learned(["torch", "rich", "rich"]) == [*preload.BASE, "rich"]


def test_sockets_of_multiprocessing_are_in_the_run_directory_until_the_worker_is_killed(
    small: None, tmp_path: Path
) -> None:
    text = """
        import multiprocessing, signal
        from multiprocessing.connection import Listener
        def listen():
            with Listener(family="AF_UNIX") as listener:
                print(listener.address, flush=True)
                signal.pause()
        multiprocessing.get_context("fork").Process(target=listen).start()
    """
    with nursery(tmp_path) as nest:
        pid = nest.start("script", [script(tmp_path, text)])
        out = tmp_path / "out.0"
        wait_until(lambda: out.exists() and out.read_text().endswith("\n"), "the address")
        address = Path(out.read_text().strip())
        assert address.parent == nest.run_dir / f"multiprocessing-{pid}", (
            "multiprocessing.util.get_temp_dir() does not look at Process._config['tempdir'] any more"
        )
        assert address.is_socket()
        os.kill(pid, signal.SIGKILL)
        nest.finish(pid)
        assert not address.parent.exists()
