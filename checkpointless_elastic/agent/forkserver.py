"""The fork server: a small single-threaded process that has torch loaded and forks the workers.

It is started with a fresh interpreter and one end of a socket pair. It answers `SpawnRequest` with `Spawned`, and tells
of each child's end with `Exited`. When the agent's end closes, whatever the reason, it kills all that it forked,
removes the run directory and exits; when it is killed itself, the kernel kills its children (PR_SET_PDEATHSIG). So
nothing outlives the agent.

While workers live, one child more waits for the request of the next one: a fork copies the page tables of all that is
loaded, which took 16 to 34 ms of a recovery.

The child leaves the server's stack altogether and runs the script from `main`, so that the interpreter's own shutdown
(threads, atexit, flushing) follows as it does under `python script.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from checkpointless_elastic import run_dir as run_dirs
from checkpointless_elastic.agent import preload
from checkpointless_elastic.protocol.messages import Frames
from checkpointless_elastic.worker import bootstrap

__all__ = [
    "Dropped",
    "Exited",
    "FromServer",
    "Loading",
    "Ready",
    "Retire",
    "SpawnRequest",
    "Spawned",
    "command",
    "frame",
    "kill_group",
    "main",
    "run_dir_of",
]

_DEFERRED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_END_TIMEOUT_S = 5
_SPARE_AFTER_S = 1.0  # when the job, or a recovery, needs the cores no more
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Retire(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The server is not needed any more, while its agent lives on: exit and leave the run directory alone."""


class SpawnRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One worker to fork.

    Attributes:
        mode: "script" or "module" run `argv[0]` in the fork; "exec" replaces it by the program `argv[0]`.
        argv: the target and its arguments.
        env: the whole environment.
        stdout: log file, empty to inherit the agent's stream.
        append: whether log files are continued (a replacement) or begun.
        unbuffered: `python -u`.
        cpus: CPUs that the worker is bound to, empty for all.
    """

    id: int
    mode: str
    argv: list[str]
    env: dict[str, str]
    stdout: str = ""
    stderr: str = ""
    append: bool = False
    unbuffered: bool = True
    cpus: list[int] = []


class Loading(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The server begins to import this module; if it dies before the next message, the module is to blame."""

    module: str


class Dropped(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """After this module the process must not be forked. The server exits."""

    module: str
    reason: str


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """All modules are loaded; requests are served from now on."""


class Spawned(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request's child has this process id. Sent before the child does anything."""

    id: int
    pid: int


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A child has ended: exit code, or the negative number of the signal."""

    pid: int
    status: int


ToServer = SpawnRequest | Retire
FromServer = Loading | Dropped | Ready | Spawned | Exited
_requests: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def frame(message: msgspec.Struct) -> bytes:
    """The message with its 4-byte length in front."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def command(fd: int, run_dir: str, modules: list[str]) -> list[str]:
    """Command line that starts a server on descriptor `fd`.

    The import path of the server is that of a script (no current directory), plus this package's own place in case it
    is not installed. `-u` makes the standard streams of all workers unbuffered, as torchrun does.
    """
    program = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv[1]);"
        "from checkpointless_elastic.agent.forkserver import main; main()"
    )
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, "-u", "-c", program, home, str(fd), run_dir, *modules]


def run_dir_of(command_line: list[str]) -> str:
    """The run directory that the command line of a server (see `command`) names; empty if it is none."""
    ours = len(command_line) > 6 and "agent.forkserver import main" in command_line[3]
    return command_line[6] if ours else ""


class _Spare(NamedTuple):
    """A child that waits for what it shall run.

    Attributes:
        pipe: takes the request.
    """

    pid: int
    pipe: int


class _Server:
    """State of the server process."""

    def __init__(self, connection: socket.socket, run_dir: str) -> None:
        self._connection = connection
        self._run_dir = run_dir
        self._frames = Frames()
        self._queue: list[SpawnRequest] = []
        self._children: set[int] = set()
        self._spare: _Spare | None = None
        self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)

    def load(self, modules: list[str]) -> None:
        """Import the modules; exits the process at the first that makes forking unsafe."""
        for module in modules:
            self._tell(Loading(module))
            reason = preload.load(module)
            if reason:
                self._tell(Dropped(module, reason))
                sys.exit(0)
        gc.collect()
        gc.freeze()  # keeps the collector from writing to pages that all workers share
        self._tell(Ready())

    def serve(self) -> SpawnRequest:
        """Fork and reap for as long as the agent lives. Returns only in a child, with what it shall run."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._wakeup[0], selectors.EVENT_READ)
            while True:
                lacks_spare = self._spare is None and bool(self._children)
                ready = {key.fd for key, _ in selector.select(_SPARE_AFTER_S if lacks_spare else None)}
                if self._wakeup[0] in ready:
                    self._reap()
                if self._connection.fileno() in ready and not self._read():
                    self._end()
                while self._queue:
                    mine = self._start(self._queue[0])
                    if mine is not None:
                        return mine
                    del self._queue[0]
                if not ready and lacks_spare:
                    spare = self._fork(bootstrap.rehearse)
                    if isinstance(spare, SpawnRequest):
                        return spare
                    self._spare = spare

    def _read(self) -> bool:
        try:
            data = self._connection.recv(1 << 20)
        except ConnectionError:
            return False
        for body in self._frames.feed(data):
            request = _requests.decode(body)
            if isinstance(request, Retire):
                self._end_spare()
                os._exit(0)
            self._queue.append(request)
        return bool(data)

    def _start(self, request: SpawnRequest) -> SpawnRequest | None:
        """A child gets the request once `Spawned` is on its way, so that nothing of it comes earlier.

        Returns in the child too, if it was forked just now, with the request.
        """
        child = self._spare or self._fork()
        if isinstance(child, SpawnRequest):
            return child
        self._spare = None
        self._children.add(child.pid)
        self._tell(Spawned(request.id, child.pid))
        with contextlib.suppress(BrokenPipeError), open(child.pipe, "wb") as pipe:  # its end will be reported
            pipe.write(msgspec.msgpack.encode(request))
        return None

    def _fork(self, first: Callable[[], None] = lambda: None) -> _Spare | SpawnRequest:
        """Fork a child that does this first, then waits for a request; returns in the child when that has come."""
        source, target = os.pipe()
        server = os.getpid()
        pid = os.fork()
        if pid:
            os.close(source)
            return _Spare(pid, target)
        os.close(target)
        self._leave(server)
        first()
        with open(source, "rb") as pipe:
            data = pipe.read()
        if not data:
            os._exit(0)  # the server has ended
        return msgspec.msgpack.decode(data, type=SpawnRequest)

    def _leave(self, server: int) -> None:
        """In a new child: be a process of its own, that dies with the server."""
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        os.setsid()
        signal.set_wakeup_fd(-1)
        self._connection.close()
        for fd in self._wakeup:
            os.close(fd)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEFERRED)

    def _reap(self) -> None:
        """Report children that have ended. What one leaves behind (loader processes) is killed with it unless it
        ended well: such processes hold its sockets open, and its peers would wait for it."""
        os.read(self._wakeup[0], 4096)
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_code != os.CLD_EXITED or ended.si_status != 0:
                kill_group(ended.si_pid)  # before the reaping, so that the number is still this child's
                shutil.rmtree(run_dirs.scratch(self._run_dir, ended.si_pid), ignore_errors=True)
            _, status = os.waitpid(ended.si_pid, 0)
            if self._spare is not None and ended.si_pid == self._spare.pid:
                os.close(self._spare.pipe)
                self._spare = None
            if ended.si_pid in self._children:
                self._children.remove(ended.si_pid)
                self._tell(Exited(ended.si_pid, os.waitstatus_to_exitcode(status)))

    def _tell(self, message: FromServer) -> None:
        try:
            self._connection.sendall(frame(message))
        except ConnectionError:
            while self._read():  # it may be retired, with the agent alive
                pass
            self._end()

    def _end_spare(self) -> None:
        if self._spare is not None:
            os.kill(self._spare.pid, signal.SIGKILL)
            os.waitpid(self._spare.pid, 0)
            self._spare = None

    def _end(self) -> None:
        """The agent is gone or has finished: leave nothing."""
        self._end_spare()
        for pid in self._children:
            kill_group(pid)
        signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(_END_TIMEOUT_S)  # one that hangs in the kernel must not keep this process
        with contextlib.suppress(TimeoutError):
            for pid in self._children:
                os.waitpid(pid, 0)
        signal.alarm(0)
        run_dirs.remove(self._run_dir)
        os._exit(0)


def kill_group(pid: int) -> None:
    """SIGKILL a worker and what it has started; nothing if they are gone."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet a group of its own, or nobody left in it
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _ignore(signum: int, stack: object) -> None:
    """SIGCHLD needs a handler for the wake-up descriptor to be written."""


def _give_up(signum: int, stack: object) -> None:
    raise TimeoutError


def main() -> None:
    """Entry of the server process; arguments: place of the package, descriptor, run directory, modules."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _DEFERRED)  # meant for the agent and the workers
    fd, run_dir, modules = int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    server = _Server(connection, run_dir)
    server.load(modules)
    request = server.serve()
    del server
    bootstrap.prepare(request.env, request.stdout, request.stderr, request.append, request.cpus)
    if request.mode == "exec":
        bootstrap.replace_process(request.argv)
    bootstrap.keep_sockets_in(run_dirs.scratch(run_dir, os.getpid()))
    bootstrap.set_title(request.mode, request.argv, request.unbuffered)
    sys.exit(bootstrap.run(request.mode, request.argv, request.unbuffered))
