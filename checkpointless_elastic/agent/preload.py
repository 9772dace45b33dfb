"""What a fork server loads before it forks, and when that is safe.

A process may be forked only while it has one thread and has not touched a GPU. Each module is therefore checked right
after its import; the fork server gives up on the first that fails, and its agent starts another one without it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType

__all__ = ["BASE", "learned", "load", "third_party", "worth_learning"]

BASE = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch._dynamo",
    "checkpointless_elastic.worker.bootstrap",
    "checkpointless_elastic.worker.session",
    "checkpointless_elastic.worker.run",
    "checkpointless_elastic.worker.rerun",
    "checkpointless_elastic.groups.patch",
)
"""What every server loads: enough for any script that trains. The job waits for it, but each worker would load the same
otherwise: torch imports its _dynamo, the slowest of them, for the first optimizer."""

_LARGE_PART = 10
_INSTALLED = ("site-packages", "dist-packages")


def load(module: str) -> str:
    """Import one module. Returns why this process must not be forked any more, or an empty string if it may."""
    try:
        importlib.import_module(module)
    except BaseException as error:  # a module may do anything at import, also raise SystemExit
        return f"its import failed with {type(error).__name__}: {error}"
    return unsafe()


def unsafe() -> str:
    """Why this process must not be forked; empty if it may."""
    if any(target.startswith("/dev/nvidia") for target in _open_files()):
        return "it opens the GPU"
    threads = len(os.listdir("/proc/self/task"))
    return f"it leaves the process with {threads} threads" if threads > 1 else ""


def _open_files() -> Iterable[str]:
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue


def third_party(modules: Mapping[str, ModuleType] | None = None) -> list[str]:
    """Names of installed (not the user's own) modules among these, by default all that are loaded, in load order."""
    found = dict(sys.modules if modules is None else modules)
    return [name for name, module in found.items() if _is_installed(name, module)]


def worth_learning(new: Collection[str], known: Iterable[str]) -> bool:
    """Whether a successor of the fork server should load these: another package, or a large part of a known one.

    Every script loads some modules of torch late. torch.distributed.optim is 19 modules and takes 0.3 s, what
    torch.compile needs is 600 and takes 1 s or more.
    """
    packages = {name.partition(".")[0] for name in known}
    return len(new) >= _LARGE_PART or any(name.partition(".")[0] not in packages for name in new)


def _is_installed(name: str, module: ModuleType | None) -> bool:
    path = getattr(module, "__file__", None)
    spec = getattr(module, "__spec__", None)
    if not isinstance(path, str) or getattr(spec, "name", None) != name:
        return False  # an alias, __main__, or nothing that an import by this name would give
    return any(part in _INSTALLED for part in path.split(os.sep))


def learned(modules: Iterable[str]) -> list[str]:
    """The list for a successor: its own, then `modules` in their order, without doubles."""
    return list(dict.fromkeys([*BASE, *modules]))
