"""The run directory: all files of one agent and its workers are in it, so that one removal leaves nothing behind.

The agent makes it and removes it at its end. If the agent was killed, its fork server does so. If both were killed at
once, by the kernel or a batch system, nobody is left to do it: then the next agent of this user on the machine does. It
knows by a lock, which the agent holds for as long as it lives, whatever its process id means elsewhere: containers may
share /dev/shm.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

__all__ = ["RunDir", "empty", "forget_kept", "kept", "overflow", "remove", "remove_abandoned", "scratch"]

_PREFIX = "checkpointless-"
_LOCK = "alive"
_SCRATCH = "multiprocessing-"
_KEPT = "kept"


class RunDir:
    """A new private directory (0700), in memory where possible; its name has the agent's process id."""

    def __init__(self) -> None:
        roots = _roots()
        for root in roots:
            remove_abandoned(root)
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=roots[0])
        partial = os.path.join(self.path, f"{_LOCK}.partial")
        self._lock = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(partial, os.path.join(self.path, _LOCK))  # it is never seen without being locked

    def remove(self) -> None:
        """Remove it with all that is in it; a fork server may do the same at the same time."""
        remove(self.path)
        os.close(self._lock)


def remove(path: str) -> None:
    """Remove a run directory and its overflow, as far as they are there."""
    for found in (path, _overflow_path(path)):
        shutil.rmtree(found, ignore_errors=True)


def empty(path: str, kept: bool = False) -> None:
    """Remove what workers have left in it, but for what is of a process, not of a run of the script.

    Sockets stay too, since the control plane listens on them. ``kept``: so does the state for the next run.
    """
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith(_SCRATCH) and not (kept and entry.name == _KEPT):
                shutil.rmtree(entry.path)
        elif entry.name != _LOCK and not stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
            os.unlink(entry.path)


def kept(path: str) -> str:
    """Where workers leave the state that the next run of the script takes up."""
    return f"{path}/{_KEPT}"


def forget_kept(path: str) -> None:
    """That state is of no use any more."""
    shutil.rmtree(kept(path), ignore_errors=True)


def scratch(path: str, pid: int) -> str:
    """Where the multiprocessing package of this worker, and of the processes that it starts, keeps its sockets."""
    return f"{path}/{_SCRATCH}{pid}"


def overflow(path: str) -> Path:
    """A directory on the disk for what has no room in the run directory at `path`; it is removed together with it.

    Raises PermissionError if somebody else has made one of this name.
    """
    found = _overflow_path(path)
    found.mkdir(mode=0o700, exist_ok=True)
    known = found.lstat()
    if known.st_uid != os.geteuid() or not stat.S_ISDIR(known.st_mode):
        raise PermissionError(f"{found} is not a directory of this user: remove it.")
    return found


def remove_abandoned(root: str) -> None:
    """Remove this user's run directories in `root` whose agents are gone, as is their fork server."""
    for path in Path(root).glob(f"{_PREFIX}*"):
        if _is_abandoned(path):
            remove(str(path))


def _is_abandoned(path: Path) -> bool:
    try:
        if path.lstat().st_uid != os.geteuid():
            return False
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # just being made, or removed by its own agent
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _roots() -> list[str]:
    """Where run directories are, the best place first."""
    shm = "/dev/shm"
    usable = os.path.isdir(shm) and os.access(shm, os.W_OK | os.X_OK)
    return [*([shm] if usable else []), tempfile.gettempdir()]


def _overflow_path(path: str) -> Path:
    name = os.path.basename(path)
    return Path(tempfile.gettempdir()) / (_PREFIX + name.removeprefix(_PREFIX))
