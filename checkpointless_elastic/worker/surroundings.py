"""What a script finds when it begins, apart from its environment: noted before the first run, put back before the next.

Each keeper notes one part and returns the function that puts it back. What is not noted here belongs to objects of the
script, which go with it, or is a library's own; a script that fails on a trace of its earlier run there, before it has
made a process group, is then run in a new process (`rerun`).
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import gc
import importlib
import logging
import multiprocessing.context
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizer_hooks

from checkpointless_elastic.worker.purge import is_library

__all__ = ["flush", "keep", "look"]

Restore = Callable[[], None]


def keep() -> Restore:
    """Note everything now; the function that puts it back. Main thread; some 1 ms."""
    restores = [keeper() for keeper in _KEEPERS]

    def restore() -> None:
        for one in restores:
            one()

    return restore


def look() -> None:
    """Read what `keep` notes."""
    for keeper in _KEEPERS:
        if keeper is not _exits:  # which does more than to read
            keeper()


def _attributes(owner: Any, *names: str) -> Restore:
    kept = {name: getattr(owner, name) for name in names}

    def restore() -> None:
        for name, value in kept.items():
            setattr(owner, name, value)

    return restore


def _together(*restores: Restore) -> Restore:
    def restore() -> None:
        for one in restores:
            one()

    return restore


def _contents(of: list[Any]) -> Restore:
    kept = list(of)

    def restore() -> None:
        of[:] = kept

    return restore


# ---- the interpreter


def _interpreter() -> Restore:
    limit, umask = sys.getrecursionlimit(), os.umask(0)
    os.umask(umask)
    collects, thresholds, directory = gc.isenabled(), gc.get_threshold(), os.getcwd()

    def restore() -> None:
        sys.setrecursionlimit(limit)
        sys.settrace(None)
        sys.setprofile(None)
        threading.settrace(None)
        threading.setprofile(None)
        os.umask(umask)
        os.chdir(directory)
        gc.set_threshold(*thresholds)
        gc.enable() if collects else gc.disable()
        random.seed()

    return restore


def _imports() -> Restore:
    lists = [_contents(of) for of in (sys.path, sys.meta_path, sys.path_hooks)]
    return _together(*lists, _attributes(sys, "argv"), importlib.invalidate_caches)


def _streams() -> Restore:
    names = ("stdin", "stdout", "stderr", "excepthook", "displayhook", "unraisablehook")
    return _together(flush, _attributes(sys, *names), _attributes(threading, "excepthook"), flush)


def flush() -> None:
    """Write what the script has printed, from Python or C."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # the script has put something else there, or closed it
            continue
    ctypes.CDLL(None).fflush(None)


def _signals() -> Restore:
    """Handlers that were not installed from Python are not seen, and stay."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def restore() -> None:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    return restore


def _libraries() -> Restore:
    """Of the standard library, what a script sets once."""
    mutated = getattr(warnings, "_filters_mutated", None) or warnings._filters_mutated_lock_held  # type: ignore[attr-defined]
    return _together(
        _contents(warnings.filters),  # type: ignore[arg-type]
        mutated,
        _attributes(warnings, "showwarning"),
        _attributes(multiprocessing.context._default_context, "_actual_context"),
        lambda: asyncio.set_event_loop_policy(None),
    )


def _logging() -> Restore:
    """Loggers that a library has made since are its own."""
    named = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]
    disabled = logging.root.manager.disable
    states = [
        _together(_attributes(one, "propagate", "disabled"), _contents(one.handlers), _contents(one.filters))
        for one in loggers
    ]
    levels = [(one, one.level) for one in loggers]

    def restore() -> None:
        for state in states:
            state()
        for logger, level in levels:
            if logger.level != level:
                logger.setLevel(level)
        logging.disable(disabled)

    return restore


def _exits() -> Restore:
    """Functions that the script's own code registers are those of one run: no run but the last calls its own."""
    registered: list[Callable[..., Any]] = []
    original = atexit.register

    def register(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if not is_library(sys._getframe(1).f_code.co_filename):
            registered.append(function)
        return original(function, *args, **kwargs)

    def restore() -> None:
        for function in registered:
            atexit.unregister(function)
        registered.clear()

    atexit.register = register  # type: ignore[assignment]
    return restore


# ---- torch


def _switches() -> list[tuple[Any, Callable[[Any], Any]]]:
    """Values and what sets them."""
    cudnn, cuda, c = torch.backends.cudnn, torch.backends.cuda, torch._C
    sharing: Any = torch.multiprocessing
    return [
        (torch.get_default_dtype(), torch.set_default_dtype),
        (torch.is_grad_enabled(), torch.set_grad_enabled),
        (torch.get_num_threads(), torch.set_num_threads),
        (torch.is_anomaly_enabled(), torch.set_anomaly_enabled),
        (torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision),
        (sharing.get_sharing_strategy(), sharing.set_sharing_strategy),
        (cuda.flash_sdp_enabled(), cuda.enable_flash_sdp),  # type: ignore[no-untyped-call]
        (cuda.mem_efficient_sdp_enabled(), cuda.enable_mem_efficient_sdp),  # type: ignore[no-untyped-call]
        (cuda.math_sdp_enabled(), cuda.enable_math_sdp),  # type: ignore[no-untyped-call]
        (c._get_cudnn_benchmark(), c._set_cudnn_benchmark),
        (c._get_cudnn_deterministic(), c._set_cudnn_deterministic),
        (c._get_cudnn_enabled(), c._set_cudnn_enabled),
        (cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value)),
    ]


def _torch() -> Restore:
    switches = _switches()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()

    def restore() -> None:
        for value, put in switches:
            put(value)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if torch.get_default_device() != torch.device("cpu"):
            torch.set_default_device(None)
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()

    return restore


def _hooks() -> Restore:
    """Hooks of all modules and optimizers, except those of this package, which puts them there once per process."""
    tables = [(table, dict(table)) for table in [*_tables(vars(hooks)), *_tables(vars(optimizer_hooks))]]

    def restore() -> None:
        for table, kept in tables:
            for number in [number for number in table if number not in kept]:
                if not str(getattr(table[number], "__module__", "")).startswith(
                    __package__.partition(".")[0]
                ):
                    del table[number]

    return restore


def _tables(names: dict[str, Any]) -> Iterable[dict[Any, Any]]:
    return [value for name, value in names.items() if name.startswith("_global") and isinstance(value, dict)]


_KEEPERS: tuple[Callable[[], Restore], ...] = (
    _interpreter,
    _imports,
    _streams,
    _signals,
    _libraries,
    _logging,
    _exits,
    _torch,
    _hooks,
)
