"""Says on which machine, with which versions and by which command a figure was measured."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["provenance"]

PACKAGES = ("torch", "checkpointless_elastic", "msgspec", "psutil", "numpy")


def machine() -> dict[str, object]:
    """Cores this process may use, processor, memory and system; no host name."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "gpus": _gpus(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def command() -> str:
    return shlex.join(["python", *sys.argv])


def provenance() -> dict[str, object]:
    """The three keys that every report of ours carries: machine, versions, command."""
    return {"machine": machine(), "versions": versions(), "command": command()}


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
