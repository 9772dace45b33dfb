"""Iterators of loaders that a script carries from one iteration of a loop to the next, as in

    batches = iter(loader)
    for step in run.steps(1000):
        train_step(next(batches))

A replacement would begin such an iterator anew and train on other data. It is seen without a fault: an iterator that
the script has made itself is there when an iteration begins, and has given items when it ends. Main thread.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch.utils.data import DataLoader

__all__ = ["begin", "by_loop", "end", "forget", "made", "watch"]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

owned = False
"""A loop of the Run makes or asks its iterator now."""
made: list[_Made] = []
"""What the script has made and still holds."""
_said = False


class _Made:
    """One iterator, and how many items it had given when the present iteration of each loop began, by `Frame.path`."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = weakref.ref(iterator)
        self.given: dict[str, int] = {}

    def now(self) -> int | None:
        """How many it has given; None if it is gone."""
        found: int | None = getattr(self.iterator(), "_num_yielded", None)
        return found

    def has_gone_on(self, loop: str) -> bool:
        """Whether it has given some in this iteration, and was there before."""
        now = self.now()
        return now is not None and now > self.given.get(loop, now)


def watch() -> None:
    """From now on iterators of DataLoaders are known."""
    if not hasattr(DataLoader.__iter__, "__wrapped__"):
        DataLoader.__iter__ = _noting(DataLoader.__iter__)  # type: ignore[method-assign]


def forget() -> None:
    """The script is run again."""
    made.clear()


def by_loop(method: Callable[P, T]) -> Callable[P, T]:
    """A method that makes or asks an iterator for a loop of the Run."""

    @functools.wraps(method)
    def owning(*args: P.args, **kwargs: P.kwargs) -> T:
        global owned
        before, owned = owned, True
        try:
            return method(*args, **kwargs)
        finally:
            owned = before

    return owning


def begin(loop: str) -> None:
    """An iteration of a loop begins."""
    for one in [*made]:
        now = one.now()
        if now is None:
            made.remove(one)
        else:
            one.given[loop] = now


def end(loop: str, kind: str) -> None:
    """It ends, in a loop of this kind: say it, once, if an iterator has gone on that was there when it began."""
    global _said
    if _said or not any(one.has_gone_on(loop) for one in made):
        return
    _said = True
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "The script takes batches from an iterator of a loader that lives longer than an iteration of run.%s: a "
            "replacement would begin it anew, and train on other data. Loop over run.batches(loader) instead.",
            kind,
        )


def _noting(make: Callable[[DataLoader[Any]], Any]) -> Callable[[DataLoader[Any]], Any]:
    @functools.wraps(make)
    def noting(loader: DataLoader[Any]) -> Any:
        iterator = make(loader)
        made[:] = [one for one in made if one.iterator() not in (None, iterator)]
        if not owned:
            made.append(_Made(iterator))
        return iterator

    return noting
