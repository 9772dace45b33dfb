"""A process that does not end after SIGKILL, as one that waits in the kernel for a device that does not answer.

Another process traces it and does not let it pass its exit (ptrace(2), PTRACE_O_TRACEEXIT): until the tracer ends, it
keeps its sockets and its number, and nobody hears of an end. Needs no root.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

PTRACE_SEIZE, PTRACE_O_TRACEEXIT = 0x4206, 0x40
PR_SET_PTRACER, ANYBODY = 0x59616D61, ctypes.c_ulong(-1)
LIMIT_S = 300.0


def hold(folder: str) -> None:
    """Make this process such a one, until there is a file "let-go" in the folder; then "held" is there."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)  # where Yama lets only ancestors trace
    tracer = subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), folder],
        stdout=subprocess.PIPE,
        env={},
        start_new_session=True,
    )
    assert tracer.stdout is not None
    assert tracer.stdout.readline() == b"held\n"
    (Path(folder) / "held").touch()


def _trace(pid: int, folder: Path) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if ptrace(PTRACE_SEIZE, pid, None, PTRACE_O_TRACEEXIT):
        sys.exit(f"Process {pid} cannot be traced: {os.strerror(ctypes.get_errno())}.")
    sys.stdout.write("held\n")
    sys.stdout.flush()
    end = time.monotonic() + LIMIT_S
    while folder.exists() and not (folder / "let-go").exists() and time.monotonic() < end:
        time.sleep(0.05)


if __name__ == "__main__":
    _trace(int(sys.argv[1]), Path(sys.argv[2]))
