"""An iterator of torch's DataLoader that starts at batch k: the one file that relies on how a DataLoader
works inside.

Read in torch 2.6 to 2.13:

* `DataLoader.__iter__` takes indices from `iter(loader.batch_sampler)`, or from `iter(loader.sampler)` where
  there is no batch sampler. Both are instance attributes whose assignment `__setattr__` forbids, but
  `vars(loader)` does not.
* the iterator calls `iter` on it before it draws its base seed, and the samplers of torch, being generators,
  draw theirs at the first `next`. An iterator with worker processes calls `iter` twice and uses the second.
* `loader._iterator` is the iterator of persistent workers, which a later pass resets without drawing a base
  seed; it then calls `iter` on its own `_index_sampler`, which it once took from the loader.

What is relied on is tested by `tests/data/test_skipping.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from checkpointless_elastic.errors import ScriptMismatchError

__all__ = ["can_skip", "has_indices", "has_live_workers", "iterate_from", "start_workers", "too_short"]

T = TypeVar("T")


def can_skip(loader: DataLoader[Any]) -> bool:
    """Whether this loader takes its indices from its sampler in the way described above."""
    return type(loader).__iter__ is DataLoader.__iter__ and has_indices(loader)


def has_indices(loader: DataLoader[Any]) -> bool:
    """Whether the iterators that DataLoader makes of it do."""
    return not isinstance(loader.dataset, IterableDataset) and _slot(loader) in vars(loader)


def has_live_workers(loader: DataLoader[Any]) -> bool:
    """Whether worker processes live on from an earlier pass."""
    return bool(loader.persistent_workers) and getattr(loader, "_iterator", None) is not None


def start_workers(loader: DataLoader[Any]) -> None:
    """Start the persistent workers of `loader` without giving them anything to load. Draws a base seed."""
    _with_sampler(loader, _Sampler(_inner(loader), blank=True))


def iterate_from(loader: DataLoader[T], position: int, batches: Sequence[Any] | None = None) -> Iterator[T]:
    """A new iterator of `loader` whose first batch is number `position`, of these batches of indices, if given.

    It draws what an iterator that started at 0 would have drawn up to there, except for what loading draws.
    """
    sampler = _Sampler(_inner(loader), skip=position, given=batches)
    iterator: Iterator[T] = _with_sampler(loader, sampler)
    sampler.advance()
    return iterator


def too_short(length: int, wanted: int) -> str:
    """The sentence for a loader that ended before the recorded item."""
    return (
        f"The loader ended after {length} items, the lost rank had consumed {wanted}; "
        "let it give the same items in each run of the script."
    )


class _Sampler:
    """Stands in for a sampler: iterators made while `skip` is set start there, later ones are those of the
    sampler."""

    def __init__(
        self, inner: Any, skip: int = 0, blank: bool = False, given: Sequence[Any] | None = None
    ) -> None:
        self._inner = inner
        self._given = given
        self._skip = skip
        self._blank = blank
        self._latest: _Indices | None = None

    def __iter__(self) -> Iterator[Any]:
        indices: Iterator[Any] = iter(self._inner if self._given is None else self._given)
        if self._blank:
            return iter(())
        if self._skip == 0:
            return indices
        self._latest = _Indices(indices, self._skip)
        return self._latest

    def __len__(self) -> int:
        return len(self._inner)

    def settle(self) -> None:
        """From now on be the sampler: persistent workers keep this object for the passes to come."""
        self._skip, self._blank, self._given = 0, False, None

    def advance(self) -> None:
        """Skip now, where no prefetch has done so."""
        if self._latest is not None:
            self._latest.advance()
            self._latest = None


class _Indices:
    """An iterator that skips at its first use."""

    def __init__(self, inner: Iterator[Any], skip: int) -> None:
        self._next: Callable[[], Any] = inner.__next__
        self._inner = inner
        self._skip = skip

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._skip:
            self.advance()
        return self._next()

    def advance(self) -> None:
        wanted, self._skip = self._skip, 0
        done = sum(1 for _ in itertools.islice(self._inner, wanted))
        if done < wanted:
            raise ScriptMismatchError(too_short(done, wanted))


def _slot(loader: DataLoader[Any]) -> str:
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def _inner(loader: DataLoader[Any]) -> Any:
    return vars(loader)[_slot(loader)]


def _with_sampler(loader: DataLoader[Any], sampler: _Sampler) -> Any:
    slot, inner = _slot(loader), _inner(loader)
    if has_live_workers(loader):
        loader._iterator._index_sampler = sampler  # type: ignore[union-attr]  # it asks no one else again
    vars(loader)[slot] = sampler
    try:
        return DataLoader.__iter__(loader)
    finally:
        vars(loader)[slot] = inner
        sampler.settle()
