"""What the kernel says of a process in /proc/PID/stat (proc_pid_stat(5))."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["ARG_END", "ARG_START", "EXIT_CODE", "FLAGS", "GROUP", "PARENT", "STATE", "stat_fields"]

STATE, PARENT, GROUP, FLAGS, ARG_START, ARG_END, EXIT_CODE = 0, 1, 2, 6, 45, 46, 49
"""Places of fields, counted from the one behind the name, which may have any letters in it."""


def stat_fields(pid: int) -> list[str]:
    """The fields behind the name. Raises OSError if the process is gone."""
    return os.fsdecode(Path(f"/proc/{pid}/stat").read_bytes()).rpartition(")")[2].split()
