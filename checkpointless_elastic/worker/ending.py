"""The end of a worker's process: no thread of this package comes back from C++ while the interpreter shuts down.

A daemon thread that asks for the interpreter's lock then is ended by unwinding its stack, and C++ code that must not
throw answers that with "terminate called without an active exception": exit code -6 of a script that has ended well
(read in CPython 3.11, `take_gil`; seen with a TCPStore whose `wait` came back in that moment). So threads are given a
moment to end; where one is stuck, in a store or a group whose node is lost, the process ends without that shutdown.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

__all__ = ["end_of_threads", "leave_if_stuck"]

PATIENCE_S = 1.0
_NAMES = "checkpointless-"


def end_of_threads(seconds: float = PATIENCE_S) -> list[str]:
    """Wait for the threads of this package; names of those that have not ended by then."""
    deadline = time.monotonic() + seconds
    ours = [thread for thread in threading.enumerate() if thread.name.startswith(_NAMES)]
    for thread in ours:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in ours if thread.is_alive())


def leave_if_stuck(code: int) -> None:
    """Returns if the interpreter can shut down, else does what its shutdown owes the script, and ends the process."""
    if not end_of_threads():
        return
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the script's own threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
