"""From a fresh fork to the user's first line, and from the script's end to the process' exit code.

The script must find what `python -u script.py` or `python -u -m module` gives it: sys.argv, sys.path[0], a new
`__main__`, the standard streams, and the same exit codes and messages when it ends. torch is loaded by the fork server,
not from here: a program that is executed does not need it. `runpy._run_module_as_main` is what
`python -m` itself calls; read in Python 3.10 to 3.13, and `tests/agent/test_bootstrap.py` compares with real runs.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import io
import os
import pkgutil
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from multiprocessing import process
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn, TextIO

from checkpointless_elastic.process_stat import ARG_END, ARG_START, stat_fields
from checkpointless_elastic.worker.unwind import Unwinding

__all__ = ["keep_sockets_in", "prepare", "rehearse", "replace_process", "run", "set_title"]

_CANNOT_START = 2
_SOCKET_PATH = 108  # bytes of sun_path, its end among them
_HERE = os.path.abspath(__file__)


def rehearse() -> None:
    """In a fork that waits for its request: touch what its start will touch.

    A fork shares memory with its server until it writes there, and to look at an object is to count it: some 2000
    pages are copied before the script begins.
    """
    if "checkpointless_elastic.worker.rerun" in sys.modules:  # else the server has not loaded torch either
        from checkpointless_elastic.worker.rerun import rehearse

        rehearse()


def prepare(env: Mapping[str, str], stdout: str, stderr: str, append: bool, cpus: list[int]) -> None:
    """Make the fork a process with its own environment, log files, CPUs and random numbers."""
    os.environ.clear()
    os.environ.update(env)
    _redirect(stdout, 1, append)
    _redirect(stderr, 2, append)
    if cpus:
        os.sched_setaffinity(0, cpus)
    _reseed()


def keep_sockets_in(folder: str) -> None:
    """Let multiprocessing, in this process and those that it starts, keep its sockets there, and not in TMPDIR.

    Each loader process that hands tensors over listens on a socket, and removes it at its end, but not when it is
    killed, as it is with its worker. Private to multiprocessing: `Process._config`, which children inherit; read in
    Python 3.11. Nothing happens where the path would be too long for a socket.
    """
    if len(os.fsencode(folder)) + len("/listener-12345678") < _SOCKET_PATH:
        os.mkdir(folder, mode=0o700)
        process.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]


def _reseed() -> None:
    """Forks would draw what their siblings draw, where fresh processes differ. Python's own generator sees to it."""
    torch, numpy_random = sys.modules.get("torch"), sys.modules.get("numpy.random")
    if torch is not None:
        torch.default_generator.seed()
    if numpy_random is not None:
        numpy_random.seed()


def _redirect(path: str, fd: int, append: bool) -> None:
    if not path:
        return
    begin = 0 if append else os.O_TRUNC
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | begin, 0o666)
    os.dup2(log, fd)
    os.close(log)


def set_title(mode: str, argv: list[str], unbuffered: bool) -> None:
    """Be listed by ps, and found by pkill -f, under the command line that torchrun would have started.

    Writes over the process' own arguments; a last byte that is not zero tells Linux to take the text before it. What
    does not fit is cut off.
    """
    fields = stat_fields(os.getpid())
    start, end = int(fields[ARG_START]), int(fields[ARG_END])
    flags = ["-u"] * unbuffered + ["-m"] * (mode == "module")
    text = os.fsencode(" ".join([sys.executable, *flags, *argv]))[: end - start - 2]
    ctypes.memmove(start, text.ljust(end - start - 1, b"\0") + b"\1", end - start)


def replace_process(argv: list[str]) -> NoReturn:
    """Become another program, found through PATH; exits with 127 if there is none, as a shell does."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them; a program expects them
    try:
        os.execvpe(argv[0], argv, os.environ)
    except OSError as error:
        print(f"Cannot run {argv[0]!r}: {error.strerror}.", file=sys.stderr)
        sys.exit(127)


def run(mode: str, argv: list[str], unbuffered: bool) -> int:
    """Run the script or module and return the exit code; does not return when a signal is its proper end."""
    if not unbuffered and not os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout, sys.stderr = _buffered(1, sys.stdout), _buffered(2, sys.stderr)
    if "CHECKPOINTLESS_SOCKET" not in os.environ:
        return _outcome(mode, argv, lambda _error: None)[1]
    from checkpointless_elastic.worker.rerun import Process

    return Process().run(functools.partial(_outcome, mode, argv))


def _outcome(
    mode: str, argv: list[str], before_report: Callable[[BaseException], None]
) -> tuple[BaseException | None, int]:
    """What the script ended with and the exit code that follows from it."""
    try:
        _execute(mode, argv)
    except Unwinding:
        raise
    except SystemExit as error:
        code = _exit_code(error)
        return (error if code else None), code
    except KeyboardInterrupt as error:
        _show(error)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return error, 130
    except BaseException as error:
        before_report(error)
        _record(error)
        _show(error)
        return error, 1
    return None, 0


def _execute(mode: str, argv: list[str]) -> None:
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    sys.argv = list(argv)
    if mode == "module":
        _prepend(os.getcwd())
        sys.argv[0] = "-m"  # what `python -m` shows while the module is being found
        runpy._run_module_as_main(argv[0])  # type: ignore[attr-defined]
        return
    path = os.path.join(os.getcwd(), argv[0])  # absolute, but as it was written
    if pkgutil.get_importer(path) is not None:  # a directory or an archive with a __main__.py
        sys.path.insert(0, path)
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
    else:
        _prepend(os.path.dirname(os.path.realpath(path)))
        _execute_file(path, main)


def _prepend(directory: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, directory)


def _execute_file(path: str, main: ModuleType) -> None:
    code = _code(path)
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=loader, __spec__=None, __package__=None)
    exec(code, main.__dict__)


def _code(path: str) -> CodeType:
    try:
        with io.open_code(path) as file:
            compiled: CodeType | None = pkgutil.read_code(file)
        if compiled is not None:
            return compiled
        with io.open_code(path) as file:
            return compile(file.read(), path, "exec", dont_inherit=True)
    except OSError as error:
        reason = f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
        print(reason, file=sys.stderr)
        sys.exit(_CANNOT_START)


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _record(error: BaseException) -> None:
    """Write the error file that torchrun's summary is made from, unless the script's own `@record` has."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if path and not (os.path.exists(path) and os.path.getsize(path)):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        error.__traceback__ = _users_part(error.__traceback__)
        get_error_handler().record_exception(error)


def _show(error: BaseException) -> None:
    """Print the traceback as the interpreter would, through the hook that the script may have set."""
    trace = _users_part(error.__traceback__)
    try:
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    except Exception:
        print("Error in sys.excepthook:", file=sys.stderr)
        traceback.print_exc()


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Without our own frames at the top; runpy's stay, as they do under `python -m`."""
    while trace is not None and os.path.abspath(trace.tb_frame.f_code.co_filename) == _HERE:
        trace = trace.tb_next
    return trace


def _buffered(fd: int, present: TextIO) -> io.TextIOWrapper:
    """The stream that an interpreter without `-u` would have on this descriptor."""
    raw = open(fd, "wb", closefd=False)
    line_buffering = fd == 2 or os.isatty(fd)
    return io.TextIOWrapper(
        raw, present.encoding, present.errors, newline="\n", line_buffering=line_buffering
    )
