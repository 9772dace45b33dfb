"""The main thread is taken out of what it runs, except of the import of a module that stays."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpointless_elastic.worker.purge import Modules
from checkpointless_elastic.worker.unwind import AGAIN_S, SIGNAL, Unwinder, Unwinding

LIBRARY = """
import sys, time
sys.unwind_begun.set()
time.sleep({seconds})
whole = True
"""


@pytest.fixture
def make() -> Iterator[Callable[[bool], Unwinder]]:
    """Makes an unwinder; `True`: imports are not cut short."""
    before, hook = signal.getsignal(SIGNAL), sys.unraisablehook
    yield lambda spares: Unwinder(lambda name: spares)
    sys.unraisablehook = hook
    signal.signal(SIGNAL, before)


def ask_when(unwinder: Unwinder, begun: threading.Event) -> None:
    threading.Thread(target=lambda: begun.wait() and unwinder.ask()).start()


def test_a_call_that_is_not_left_gives_its_value(make: Callable[[bool], Unwinder]) -> None:
    unwinder = make(False)
    assert unwinder.guard(lambda: 7) == 7
    assert not unwinder.asked.is_set()


def test_sleep_and_lock_are_left_though_the_exception_is_swallowed(make: Callable[[bool], Unwinder]) -> None:
    unwinder, begun, caught = make(False), threading.Event(), []

    def stubborn() -> int:
        begun.set()
        for wait in (lambda: time.sleep(1000), threading.Event().wait, lambda: time.sleep(1000)):
            try:
                wait()
            except Unwinding as error:
                caught.append(error)
        time.sleep(1000)
        return 7

    ask_when(unwinder, begun)
    assert unwinder.guard(stubborn) == 0
    assert unwinder.asked.is_set() and len(caught) == 3


def test_what_a_finalizer_swallows_is_not_printed_and_comes_again(
    make: Callable[[bool], Unwinder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    unwinder, begun = make(False), threading.Event()

    class Finalized:
        def __del__(self) -> None:
            begun.set()
            time.sleep(1000)

    def script() -> int:
        Finalized()
        time.sleep(1000)
        return 7

    ask_when(unwinder, begun)
    assert unwinder.guard(script) == 0
    assert "Unwinding" not in capsys.readouterr().err


@pytest.mark.parametrize("spares", [True, False])
def test_the_import_of_a_library_is_not_cut_short(
    spares: bool, make: Callable[[bool], Unwinder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"unwind_library_{spares}"
    (tmp_path / f"{name}.py").write_text(LIBRARY.format(seconds=4 * AGAIN_S if spares else 1000))
    monkeypatch.syspath_prepend(tmp_path)
    unwinder, begun = make(spares), threading.Event()
    monkeypatch.setattr(sys, "unwind_begun", begun, raising=False)

    def script() -> int:
        __import__(name)
        time.sleep(1000)
        return 7

    ask_when(unwinder, begun)
    assert unwinder.guard(script) == 0
    assert hasattr(sys.modules.pop(name, None), "whole") is spares


def test_own_modules_are_told_from_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("own_package", "site-packages/installed_package", "own_namespace"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "part.py").touch()
    (tmp_path / "own_package/__init__.py").touch()
    (tmp_path / "site-packages/installed_package/__init__.py").touch()
    for place in (tmp_path, tmp_path / "site-packages"):
        monkeypatch.syspath_prepend(place)
    modules = Modules()
    for name in ("own_package.part", "installed_package.part", "own_namespace.part", "sched"):
        __import__(name)
    own = {name for name in modules.own() if name.startswith(("own_", "installed_", "sched", "torch"))}
    assert own == {"own_package", "own_package.part", "own_namespace", "own_namespace.part"}
    assert not modules.stays("own_package") and modules.stays("installed_package.part")
    for name in [*own, "installed_package", "installed_package.part"]:
        del sys.modules[name]
