"""A script in a fork does and ends as under `python -u`: compared with real runs, messages and tracebacks included."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.nursery import Ended, Nursery, nursery

SCRIPTS = {
    "prints": "import sys; print('out'); print('err', file=sys.stderr)",
    "exits with a number": "import sys; sys.exit(3)",
    "exits with a negative number": "import sys; sys.exit(-1)",
    "exits with a large number": "import sys; sys.exit(259)",
    "exits with nothing": "import sys; sys.exit()",
    "exits with true": "import sys; sys.exit(True)",
    "exits with a message": "import sys; sys.exit('that is all')",
    "exits with a tuple": "import sys; sys.exit((1, 2))",
    "leaves at once": "import os; print('x', end=''); os._exit(9)",
    "aborts": "import os; os.abort()",
    "is interrupted": "raise KeyboardInterrupt",
    "raises": (
        "def f():\n    raise ValueError('no')\ntry:\n    f()\nexcept ValueError as e:\n"
        "    raise KeyError('x') from e"
    ),
    "raises a base exception": "class Odd(BaseException): pass\nraise Odd('odd')",
    "has a syntax error": "x = 1\nif x print(x)\n",
    "has its own hook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__, a[1])\n1/0",
    "runs atexit handlers": "import atexit\natexit.register(print, 'at exit')\nprint('end')\nraise SystemExit(2)",
    "fails with an atexit handler": "import atexit\natexit.register(print, 'at exit')\n1/0",
    "waits for threads": (
        "import threading\ngo = threading.Event()\n"
        "threading.Thread(target=lambda: (go.wait(), print('thread'))).start()\nprint('main')\ngo.set()"
    ),
    "finds itself as main": (
        "import pickle, sys\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A\n"
        "main = sys.modules['__main__']\n"
        "print(main.A is A, __name__, __file__, __package__, __spec__ and __spec__.name, __cached__)\n"
        "print(type(__loader__).__name__, __builtins__ is __import__('builtins'), sorted(vars(main)))"
    ),
    "spawns processes": (
        "import multiprocessing\ndef double(x): return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(double, [1, 2]))"
    ),
    "warns": "import warnings\nwarnings.warn('careful')",
    "uses annotations": "x: int = 3\nprint(__annotations__)",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def nest(home: Path) -> Iterator[Nursery]:
    with nursery(home) as made:
        yield made


def real(home: Path, *args: str) -> Ended:
    done = subprocess.run([sys.executable, *args], cwd=home, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("what", SCRIPTS)
def test_a_script_ends_as_under_plain_python(nest: Nursery, home: Path, what: str) -> None:
    script = home / "script.py"
    script.write_text(SCRIPTS[what] + "\n")
    assert nest.run("script", [str(script), "arg"]) == real(home, "-u", str(script), "arg")


@pytest.mark.parametrize(
    "what", ["prints", "exits with a message", "waits for threads", "fails with an atexit handler"]
)
def test_without_u_the_streams_are_buffered_and_nothing_is_lost(
    nest: Nursery, home: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    script = home / "script.py"
    script.write_text("import sys; print(sys.stdout.write_through)\n" + SCRIPTS[what] + "\n")
    assert nest.run("script", [str(script)], unbuffered=False) == real(home, str(script))


@pytest.mark.parametrize(
    "what", ["prints", "exits with a message", "finds itself as main", "has a syntax error"]
)
def test_a_module_ends_as_under_plain_python(nest: Nursery, home: Path, what: str) -> None:
    (home / "module.py").write_text(SCRIPTS[what].replace("__loader__", "''") + "\n")
    expected = real(home, "-u", "-m", "module", "arg")
    assert nest.run("module", ["module", "arg"]) == expected


@pytest.mark.parametrize(
    "target", ["./folder/here.py", "folder/../folder/here.py", "folder", "./folder/", "folder.zip"]
)
def test_relative_targets_are_what_plain_python_makes_of_them(nest: Nursery, home: Path, target: str) -> None:
    (home / "folder").mkdir(exist_ok=True)
    text = "import sys; print(__file__, __spec__ and __spec__.name, sys.argv, sys.path[0])\n1 / 0\n"
    for name in ("here.py", "__main__.py"):
        (home / "folder" / name).write_text(text)
    with zipfile.ZipFile(home / "folder.zip", "w") as archive:
        archive.writestr("__main__.py", text)
    assert nest.run("script", [target, "-a"]) == real(home, "-u", target, "-a")


@pytest.mark.parametrize("target", ["missing.py", "./missing.py", "/missing/folder/x.py"])
def test_a_missing_script_is_reported_as_by_plain_python(nest: Nursery, home: Path, target: str) -> None:
    assert nest.run("script", [target]) == real(home, "-u", target)


def test_a_missing_module_is_reported_as_by_plain_python(nest: Nursery, home: Path) -> None:
    assert nest.run("module", ["missing_module"]) == real(home, "-u", "-m", "missing_module")


def test_the_scripts_own_folder_comes_first_on_the_path_also_through_a_link(
    nest: Nursery, home: Path
) -> None:
    (home / "inner").mkdir()
    (home / "inner" / "script.py").write_text("import sys; print(sys.path[0], sys.argv)\n")
    (home / "link.py").symlink_to("inner/script.py")
    for target in ("inner/script.py", "link.py"):
        assert nest.run("script", [target, "-a"]) == real(home, "-u", target, "-a")


def test_no_module_of_the_current_folder_is_found_by_accident(nest: Nursery, home: Path) -> None:
    (home / "accident.py").write_text("")
    (home / "sub").mkdir()
    (home / "sub" / "script.py").write_text("import accident\n")
    assert nest.run("script", ["sub/script.py"]).status == 1


def test_the_environment_is_the_requests_and_nothing_else(nest: Nursery, home: Path) -> None:
    script = home / "script.py"
    script.write_text("import os; print('\\n'.join(f'{k}={v}' for k, v in sorted(os.environ.items())))\n")
    assert nest.run("script", [str(script)], {"LOCAL_RANK": "3"}).out.count("LOCAL_RANK=3\n") == 1
    assert "OPENBLAS_NUM_THREADS" not in nest.run("script", [str(script)]).out


def test_siblings_draw_different_random_numbers_where_fresh_processes_would(
    nest: Nursery, home: Path
) -> None:
    script = home / "script.py"
    script.write_text(
        "import random, numpy, torch, tempfile, uuid\n"
        "print(random.random(), numpy.random.rand(), uuid.uuid4(), next(tempfile._get_candidate_names()))\n"
        "print(torch.rand(1).item(), torch.initial_seed())\n"
    )
    first, second = (nest.run("script", [str(script)]).out.split() for _ in range(2))
    assert len(first) == 6
    assert not set(first) & set(second)


def test_an_error_file_is_written_unless_the_script_has_written_one(nest: Nursery, home: Path) -> None:
    script, error = home / "script.py", home / "error.json"
    script.write_text("raise ValueError('mine')\n")
    nest.run("script", [str(script)], {"TORCHELASTIC_ERROR_FILE": str(error)})
    data = json.loads(error.read_text())["message"]
    assert data["message"] == "ValueError: mine"
    assert data["extraInfo"]["py_callstack"].startswith(
        f'Traceback (most recent call last):\n  File "{script}", line 1'
    )
    script.write_text(f"open({str(error)!r}, 'w').write('own')\nraise ValueError('mine')\n")
    nest.run("script", [str(script)], {"TORCHELASTIC_ERROR_FILE": str(error)})
    assert error.read_text() == "own"


def test_sys_exit_and_signals_leave_no_error_file(nest: Nursery, home: Path) -> None:
    script, error = home / "script.py", home / "no-error.json"
    for text in ("raise SystemExit(3)", "raise KeyboardInterrupt", "import os; os.kill(os.getpid(), 9)"):
        script.write_text(text)
        nest.run("script", [str(script)], {"TORCHELASTIC_ERROR_FILE": str(error)})
    assert not error.exists()


def test_a_worker_leads_its_own_session_with_default_signals(nest: Nursery, home: Path) -> None:
    script = home / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            assert os.getsid(0) == os.getpgid(0) == os.getpid()
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL == signal.getsignal(signal.SIGCHLD)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.set_wakeup_fd(-1) == -1
            print(sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1])
            """
        )
    )
    ended = nest.run("script", [str(script)])
    assert ended.status == 0, ended.err
    assert ended.out == "[0, 1, 2]\n"


def test_a_worker_is_listed_under_its_scripts_name(nest: Nursery, home: Path) -> None:
    (home / "listed.py").write_text("print(open('/proc/self/cmdline').read().strip(chr(0)))\n")
    assert nest.run("script", ["listed.py", "-a"]).out == f"{sys.executable} -u listed.py -a\n"
    assert nest.run("module", ["listed"], unbuffered=False).out == f"{sys.executable} -m listed\n"
    long = "x" * 100_000
    assert nest.run("script", ["listed.py", long]).out.startswith(f"{sys.executable} -u listed.py xxx")


def test_a_program_is_executed_with_default_signals(nest: Nursery) -> None:
    ended = nest.run("exec", ["sh", "-c", "grep SigIgn /proc/self/status; exit 5"])
    assert ended.status == 5
    assert int(ended.out.split()[1], 16) == 0
