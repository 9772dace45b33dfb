"""Hosts on one machine: network namespaces with one cable each to one bridge.

A host has its own addresses, host name, loopback, abstract sockets and /dev/shm; files and process numbers are those
of the machine. The bridge stands in a namespace of its own, so nothing of this is seen by the machine or by other
Hosts, and all may use the same addresses. Hosts know each other's hardware addresses from the start: a host that is
cut off is silent, and no one gets "no route to host" instead.

Names begin with ``ce-``, the number of the process that made them and when it started: what a killed process left
behind is swept away by the next Hosts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType

DEVICE = "eth0"
WIRE = Path(__file__).with_name("wire.py")
NAMESPACES = Path("/run/netns")
PREFIX = "ce"
ENTER = """
echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit 125
shift 2
exec "$@"
"""
_numbers = count()


class HostsError(RuntimeError):
    """Raised when a namespace, a cable or a process in it could not be made, changed or removed."""


class Host:
    """One host, on from the start. `cut`, `kill` and `heal` may be called at any time, again too.

    Attributes:
        name: its host name, which all hosts resolve.
        address: its IPv4 address.
    """

    def __init__(self, hosts: Hosts, number: int) -> None:
        self.name = f"host-{number}"
        self.address = f"198.18.0.{number + 1}"
        self.hardware = f"02:00:c6:12:00:{number + 1:02x}"
        self._hosts = hosts
        self._number = number
        self._namespace = f"{hosts.label}-h{number}"
        self._port = f"port{number}"
        self._wire: subprocess.Popen[bytes] | None = None
        self._quality: tuple[float, float, float] | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._connected = False

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a program on this host, in a process group of its own whose number is that of the process.

        `env`: variables beside those of this process; gloo and NCCL are told the host's device.
        `log`: file to which both outputs are appended; None: those of this process.
        """
        if not self.is_on:
            raise HostsError(f"{self.name} is switched off; heal() it before programs are run on it.")
        own = {"GLOO_SOCKET_IFNAME": DEVICE, "NCCL_SOCKET_IFNAME": DEVICE}
        output = log.open("ab") if log else None
        child = subprocess.Popen(
            [*_inside(self._namespace), *self._hosts.entering(self.name), *argv],
            env={**os.environ, **own, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            cwd=cwd,
            start_new_session=True,
        )
        if output:
            output.close()
        self._children.append(child)
        return child

    @property
    def is_on(self) -> bool:
        return (NAMESPACES / self._namespace).exists()

    def cut(self) -> None:
        """Packets are dropped both ways from now on, without a word to anyone."""
        if self._connected:
            _ip(self._hosts.hub, f"link set {self._plug} nomaster")
            self._connected = False

    def kill(self) -> None:
        """Power off: cut first, so that no closing connection is heard of, then every process is killed."""
        self.cut()
        if self.is_on:
            # One that was started just now may not have entered the namespace yet.
            for child in self._children:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            _kill_all(self._namespace)
            for child in self._children:
                child.wait()
            self._children.clear()
            self._unplug()
            _ip("", f"netns del {self._namespace}")

    def heal(self) -> None:
        """Connected again; a host that was off is on again, and nothing runs on it."""
        if not self.is_on:
            self.switch_on()
        elif not self._connected:
            self._connect()

    def delay(self, ms: float, jitter: float = 0.0, loss_percent: float = 0.0) -> None:
        """Each packet that leaves or reaches this host comes `ms` ± `jitter` milliseconds later, or not at all.

        A packet never overtakes another. All zero: as at the start. Takes some 0.1 s, in which packets are lost.
        """
        connected = self._connected
        self.cut()
        self._unwire()
        quality = (ms, jitter, loss_percent)
        self._quality = quality if any(quality) else None
        self._rewire()
        if connected:
            self._connect()

    def has(self, pid: int) -> bool:
        """Whether the process runs on this host."""
        return self.is_on and _namespace_of(pid) == _number_of(self._namespace)

    def processes(self) -> list[int]:
        """All that run on this host."""
        return _processes(self._namespace) if self.is_on else []

    def switch_on(self) -> None:
        """Makes the namespace and its cable."""
        _ip("", f"netns add {self._namespace}")
        cable = f"type veth peer name {DEVICE} address {self.hardware} mtu 1500 netns {self._namespace}"
        _ip(self._hosts.hub, f"link add {self._port} {cable}", f"link set {self._port} up")
        others = (host for host in self._hosts if host is not self)
        _ip(
            self._namespace,
            "link set lo up",
            f"addr add {self.address}/24 dev {DEVICE}",
            f"link set {DEVICE} up",
            *(f"neigh replace {o.address} lladdr {o.hardware} dev {DEVICE} nud permanent" for o in others),
        )
        self._rewire()
        self._connect()

    @property
    def _plug(self) -> str:
        """The device that is put into the bridge."""
        return f"plug{self._number}" if self._wire else self._port

    def _connect(self) -> None:
        _ip(self._hosts.hub, f"link set {self._plug} master bridge", f"link set {self._plug} up")
        self._connected = True

    def _rewire(self) -> None:
        """Puts a process between port and bridge that forwards packets as delay() said."""
        if self._quality is None:
            return
        ends = (f"wire{self._number}", f"plug{self._number}")
        _ip(
            self._hosts.hub,
            f"link add {ends[0]} type veth peer name {ends[1]}",
            f"link set {ends[0]} up",
            f"link set {ends[1]} up",
        )
        _check([*_inside(self._namespace), *_python(WIRE), "plain", DEVICE])
        _check([*_inside(self._hosts.hub), *_python(WIRE), "plain", ends[1]])
        forward = ["forward", self._port, ends[0], *map(str, self._quality)]
        self._wire = subprocess.Popen(
            [*_inside(self._hosts.hub), *_python(WIRE), *forward],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._wire.stdout is not None
        if not self._wire.stdout.readline():
            raise HostsError(f"The wire of {self.name} did not start; see above.")

    def _unwire(self) -> None:
        if self._wire:
            self._wire.kill()
            self._wire.communicate()
            _ip(self._hosts.hub, f"link del wire{self._number}")
            self._wire = None

    def _unplug(self) -> None:
        self._unwire()
        _ip(self._hosts.hub, f"link del {self._port}")


class Hosts:
    """Some hosts; as a context manager it leaves no namespace, cable or process behind."""

    def __init__(self, number: int) -> None:
        self.label = f"{PREFIX}-{os.getpid()}-{_start_of(os.getpid())}-{next(_numbers)}"
        self.hub = f"{self.label}-hub"
        self._folder = tempfile.TemporaryDirectory(prefix="hosts-")
        self._hosts = [Host(self, index) for index in range(number)]

    def __enter__(self) -> Hosts:
        sweep()
        lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self)]
        try:
            self._names().write_text("\n".join([*lines, ""]))
            _ip("", f"netns add {self.hub}")
            _ip(
                self.hub,
                "link set lo up",
                "link add bridge type bridge mcast_snooping 0",
                "link set bridge up",
            )
            for host in self:
                host.switch_on()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def first(self, number: int) -> list[Host]:
        return self._hosts[:number]

    def entering(self, name: str) -> list[str]:
        """The words before a command that give it the host's name, the names of all hosts and its own /dev/shm."""
        return ["unshare", "--uts", "sh", "-c", ENTER, "sh", name, str(self._names())]

    def where(self, pid: int) -> Host | None:
        """The host on which a process runs."""
        return next((host for host in self if host.has(pid)), None)

    def _names(self) -> Path:
        return Path(self._folder.name) / "hosts"

    def _end(self) -> None:
        with _uninterrupted():
            for host in self:
                host.kill()
            _remove(name for name in _existing() if name.startswith(f"{self.label}-"))
            self._folder.cleanup()


def sweep() -> list[str]:
    """Removes the namespaces, with all processes in them, of owners that are gone, and returns their names."""
    dead = [name for name in _existing() if not _owner_lives(name)]
    _remove(dead)
    return dead


def supported() -> str:
    """Why hosts cannot be made here, in one sentence; empty where they can."""
    if os.geteuid() != 0:
        return "Network namespaces need root; run this as root."
    for program in ("ip", "unshare"):
        if not shutil.which(program, path=_path()):
            return f"There is no program {program}; install iproute2 and util-linux."
    try:
        with Hosts(1) as hosts:
            if hosts[0].run(["true"]).wait(10):
                return "A host name and a file system of its own cannot be given to a process here (CAP_SYS_ADMIN)."
    except (HostsError, subprocess.SubprocessError) as error:
        return f"Network namespaces cannot be made here: {error}"
    return ""


def _ip(namespace: str, *commands: str) -> None:
    """Runs commands of iproute2, in one go, in a namespace ('': that of the machine)."""
    place = ["-n", namespace] if namespace else []
    _check(["ip", *place, "-batch", "-"], "\n".join([*commands, ""]))


def _check(argv: Sequence[str], text: str = "") -> None:
    done = subprocess.run(
        argv,
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": _path()},
        timeout=30,
        check=False,
    )
    if done.returncode:
        raise HostsError(f"{' '.join(argv)} failed: {' '.join((text + done.stderr).split())}")


def _path() -> str:
    """ip stands in a folder that not every user has in PATH."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _inside(namespace: str) -> list[str]:
    return [shutil.which("ip", path=_path()) or "ip", "netns", "exec", namespace]


def _python(script: Path) -> list[str]:
    return [sys.executable, "-I", "-S", str(script)]


def _existing() -> list[str]:
    return sorted(path.name for path in NAMESPACES.glob(f"{PREFIX}-*-*-*-*"))


def _owner_lives(namespace: str) -> bool:
    pid, start = namespace.split("-")[1:3]
    return _start_of(int(pid)) == start


def _start_of(pid: int) -> str:
    """When the process started, in the kernel's ticks, since numbers of processes are used again; empty if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _number_of(namespace: str) -> int:
    return (NAMESPACES / namespace).stat().st_ino


def _namespace_of(pid: int) -> int:
    """The number of the process's network namespace; 0 if it is gone or about to be."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _processes(namespace: str) -> list[int]:
    number = _number_of(namespace)
    return [
        int(name) for name in os.listdir("/proc") if name.isdigit() and _namespace_of(int(name)) == number
    ]


def _kill_all(namespace: str, timeout: float = 20) -> None:
    """SIGKILL until nobody is left: a process may be forking while it is killed."""
    end = time.monotonic() + timeout
    while found := _processes(namespace):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            raise HostsError(f"Processes {found} in {namespace} did not end {timeout:g} s after SIGKILL.")
        time.sleep(0.002)


def _remove(namespaces: Iterable[str]) -> None:
    for name in namespaces:
        _kill_all(name)
        _ip("", f"netns del {name}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not end the cleaning up that the first one caused."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
