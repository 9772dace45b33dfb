"""Where a loop's items come from, and how a source is stood before item k without loading the items before
it.

What resumes exactly, that is with the items, the order and the random state of a run without a fault:

* torch's DataLoader over a map-style dataset, with any sampler or batch sampler, `set_epoch`, `generator`,
  worker processes, `persistent_workers` and `pin_memory`: the iterator is created again under the random
  state that it was created with and skips on the (batch) sampler.
* anything with `state_dict()` and `load_state_dict()`, such as torchdata's StatefulDataLoader: its state is
  taken before each fetch. It must be readable by `torch.load(weights_only=True)`.
* iterable datasets and other iterables: what was consumed is fetched once more and dropped. So are loaders with an
  `__iter__` of their own, as those of Hugging Face Accelerate.

When the number of ranks changes within a pass, what is left of it is dealt anew where torch's DistributedSampler
dealt it, see `checkpointless_elastic.data.dealing`; other loaders go on at the same number of batches.

Limits, all of which concern randomness that this process cannot see or put back:

* random transforms inside DataLoader worker processes (num_workers > 0): after a skip the workers have not
  drawn what the skipped items would have drawn. The right samples come in the right order, otherwise
  transformed, until the pass ends; the next pass is exact again (not with `persistent_workers`). It could be
  made exact only by loading all items again, or by sending 10 kB of random state with each item through the
  loader's queue, for each item and worker in flight; neither is done.
* a sampler or an iterable that draws from the global generators between items, with a body that draws from
  them too: the items already consumed are drawn anew without the body. A generator of its own is exact if it
  is the attribute `generator` of the loader or of its samplers.
* a sampler that counts its own passes: give it the epoch through `set_epoch` instead. What the loaders of Accelerate
  and of Lightning's Fabric count is brought back, where they are made before the loops.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from checkpointless_elastic.data import dealing, skipping
from checkpointless_elastic.data.carried import by_loop
from checkpointless_elastic.data.cursor import Frame
from checkpointless_elastic.data.lasting import Kept
from checkpointless_elastic.data.parts import (
    counters_of,
    generators_of,
    is_accelerates,
    is_stateful,
    keeps_workers,
    parts_of,
)
from checkpointless_elastic.errors import ScriptMismatchError, StateMismatchError
from checkpointless_elastic.worker import generators, rng

__all__ = ["Consumed", "Numbers", "Sampled", "Source", "Stateful", "source_of"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """The items of one loop. The loop keeps the random state of the process, a source only what is its
    own."""

    def state(self) -> tuple[bytes, ...]:
        """What must be put back, besides the random state of the process, to fetch again what comes now."""

    def owner(self) -> object:
        """The loader."""

    def lasting(self) -> Kept:
        """What the loader keeps from one pass to the next; see `checkpointless_elastic.data.lasting`."""

    def revive(self, kept: Kept) -> None:
        """Bring the loader to this, without drawing from any generator of the process."""

    def dealing(self) -> tuple[int, int] | None:
        """See `cursor.Frame`."""

    def open(self) -> None:
        """Create the iterator."""

    def reopen(self, frame: Frame) -> None:
        """Create the iterator as it was before the item of `frame.position` was fetched."""

    def fetch(self) -> T_co:
        """The next item; StopIteration after the last. Blocks as the loader does."""


class Numbers:
    """0 to n - 1."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._next = 0

    def state(self) -> tuple[bytes, ...]:
        """Nothing: the position is in the frame."""
        return ()

    def owner(self) -> object:
        """Itself: there is no loader."""
        return self

    def lasting(self) -> Kept:
        """Nothing."""
        return Kept()

    def revive(self, kept: Kept) -> None:
        """Nothing to bring back."""

    def dealing(self) -> tuple[int, int] | None:
        """All ranks have the same."""
        return None

    def open(self) -> None:
        """Start at 0."""

    def reopen(self, frame: Frame) -> None:
        """Start at the recorded number."""
        self._next = frame.position

    def fetch(self) -> int:
        """The next number."""
        if self._next >= self._n:
            raise StopIteration
        self._next += 1
        return self._next - 1


class _Loader(Generic[T]):
    """A loader with generators and counters of its own."""

    def __init__(self, loader: Iterable[T]) -> None:
        self._loader = loader
        self._parts = parts_of(loader)
        self._generators = generators_of(self._parts.values())
        self._lasting_workers = [part for part in self._parts.values() if keeps_workers(part)]
        self._iterator: Iterator[T] = iter(())

    def owner(self) -> object:
        """The loader."""
        return self._loader

    def state(self) -> tuple[bytes, ...]:
        """The loader's own generators."""
        return tuple(map(generators.read, self._generators))

    def lasting(self) -> Kept:
        """The loader's own generators and counters, and whether worker processes live on from an earlier pass."""
        lives = tuple(map(skipping.has_live_workers, self._lasting_workers))
        return Kept(_Loader.state(self), lives, counters_of(self._parts))

    @by_loop
    def revive(self, kept: Kept) -> None:
        """Put them back; worker processes that would have lived on are started."""
        for base, lives in zip(self._lasting_workers, kept.lives, strict=False):
            if lives and not skipping.has_live_workers(base):
                before = rng.capture()
                skipping.start_workers(base)
                rng.restore(before)
        self._restore(kept.generators)
        for name, number in counters_of(self._parts).items():
            place, _, attribute = name.rpartition(".")
            vars(self._parts[place])[attribute] = kept.counters.get(name, number)

    def _restore(self, states: Sequence[bytes]) -> None:
        if len(self._generators) != len(states):
            raise ScriptMismatchError(
                f"The loader has {len(self._generators)} generators of its own, the lost rank's had {len(states)}; "
                "build it in the same way in each run of the script."
            )
        for generator, one in zip(self._generators, states, strict=True):
            generators.write(generator, one)

    def dealing(self) -> tuple[int, int] | None:
        """How a loader is dealt is known of `Sampled` only."""
        return None

    @by_loop
    def open(self) -> None:
        """Create the iterator, which may start worker processes."""
        self._iterator = iter(self._loader)

    @by_loop
    def fetch(self) -> T:
        """The next item."""
        return next(self._iterator)


class Sampled(_Loader[T]):
    """A map-style DataLoader: skips on its sampler."""

    _loader: DataLoader[T]

    def dealing(self) -> tuple[int, int] | None:
        """Of torch's DistributedSampler in a BatchSampler."""
        return dealing.dealt(self._loader)

    @by_loop
    def reopen(self, frame: Frame) -> None:
        """Create the iterator and skip on the sampler, some 10 milliseconds per million samples."""
        self.revive(frame.source_create)
        batches = dealing.batches(self._loader, frame.deals) if frame.deals else None
        self._iterator = skipping.iterate_from(self._loader, frame.position, batches)
        self._restore(frame.source_start)


class Consumed(_Loader[T]):
    """Any iterable: fetches again what was consumed and drops it."""

    @by_loop
    def reopen(self, frame: Frame) -> None:
        """Create the iterator and drop the first `frame.position` items; takes as long as loading them."""
        self.revive(frame.source_create)
        self.open()
        for done in range(frame.position):
            try:
                next(self._iterator)
            except StopIteration as error:
                raise ScriptMismatchError(skipping.too_short(done, frame.position)) from error
        self._restore(frame.source_start)


class Stateful(_Loader[T]):
    """A loader that can say and take back where it is.

    Its state is asked for from the second item on: before the first one, some loaders would create an
    iterator to answer, and others still stand where the pass before ended."""

    _loader: Any
    _begun = False

    def state(self) -> tuple[bytes, ...]:
        """The loader's own generators, then its state."""
        if not self._begun:
            return super().state()
        buffer = io.BytesIO()
        torch.save(self._loader.state_dict(), buffer)
        return (*super().state(), buffer.getvalue())

    @by_loop
    def reopen(self, frame: Frame) -> None:
        """Load the recorded state and create the iterator."""
        self.revive(frame.source_create)
        if frame.position == 0:
            self.open()
            self._restore(frame.source_start)
        else:
            *states, blob = frame.source_start
            self._loader.load_state_dict(self._read(blob))
            self.open()
            self._restore(states)

    def fetch(self) -> T:
        """The next item."""
        self._begun = True
        return super().fetch()

    def _read(self, blob: bytes) -> Any:
        try:
            return torch.load(io.BytesIO(blob), weights_only=True)
        except Exception as error:
            raise StateMismatchError(
                f"The state_dict of {type(self._loader).__name__} cannot be read without running its code "
                f"({error}); keep only tensors, numbers, strings and containers of them in it."
            ) from error


def source_of(loader: Iterable[T]) -> Source[T]:
    """The source that stands `loader` before item k in the cheapest exact way."""
    if is_stateful(loader) and not is_accelerates(loader) and not _only_counts(loader):
        return Stateful(loader)
    if isinstance(loader, DataLoader) and skipping.can_skip(loader):
        return Sampled(loader)
    return Consumed(loader)


def _only_counts(loader: object) -> bool:
    """True for a StatefulDataLoader over an iterable without a state.

    It consumes and drops too, and torchdata 0.11 counts what it dropped twice: its next state is wrong.
    """
    dataset = getattr(loader, "dataset", None)
    return (
        isinstance(loader, DataLoader) and isinstance(dataset, IterableDataset) and not is_stateful(dataset)
    )
