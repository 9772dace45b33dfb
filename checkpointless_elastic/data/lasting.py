"""What a loader keeps from one pass to the next: its own generators, and worker processes that live on.

While a loop is in the cursor its frame says all this. Between two passes over the same loader there is no
frame, so the cursor has a table of it: one entry for each loader, found by the places in the script
(`Frame.path`) that use it. A replacement that enters such a place for the first time takes the entry up, if
its loader is as that of the lost rank was at its first pass. A loader that is made anew for each pass is told
from one that is used again by the object, from its second pass on; before that, one whose generator starts
the same each time is taken for one that is used again."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Protocol

import msgspec

__all__ = ["Lasting", "Loader", "Loaders"]

State = tuple[bytes, ...]


class Lasting(msgspec.Struct, array_like=True):
    """One loader.

    Attributes:
        paths: the places in the script that use it.
        first: digest of its state when it was first used.
        last: its state when it was last left.
        renewed: another object is used at each pass.
    """

    paths: list[str]
    first: bytes
    last: State
    renewed: bool = False


class Loader(Protocol):
    """The side of a source that lasts."""

    def owner(self) -> object:
        """The loader itself, which must allow weak references if `lasting` is not empty."""

    def lasting(self) -> State:
        """What the loader keeps between two passes; empty if nothing."""

    def revive(self, state: State) -> None:
        """Bring the loader to such a state, without drawing from any generator of the process."""


class _Bound:
    """A loader of this process that is known to be that of an entry."""

    def __init__(self, owner: object, entry: Lasting) -> None:
        self.owner = weakref.ref(owner)
        self.entry = entry
        self.replayed: State | None = None  # its state after a loop that was only met again


class Loaders:
    """Which loaders of this process belong to which entries of the cursor's table. Main thread only."""

    def __init__(self, table: list[Lasting]) -> None:
        self._table = table
        self._bound: list[_Bound] = []
        self._taken: list[Lasting] = []  # entries whose loader was met, even if it is gone since

    def entering(self, path: str, source: Loader) -> None:
        """A loop over this loader is entered for the first time here: bring the loader to where it was
        left."""
        state = source.lasting()
        if not state:
            return
        bound = self._find(source.owner())
        if bound is None:
            self._meet(path, source, state)
            return
        if bound.replayed == state:
            source.revive(bound.entry.last)
        bound.replayed = None
        if path not in bound.entry.paths:
            bound.entry.paths.append(path)

    def met_again(self, path: str, source: Loader) -> None:
        """A recorded loop over this loader is entered; its frame says where the loader was."""
        entry = self._entry(path)
        if entry is not None and source.lasting() and self._find(source.owner()) is None:
            self._bind(source.owner(), entry)

    def leaving(self, source: Loader, replayed: bool) -> None:
        """A loop over this loader is left."""
        state = source.lasting()
        bound = self._find(source.owner()) if state else None
        if bound is None:
            return
        bound.replayed = state if replayed else None
        if not replayed:
            bound.entry.last = state

    def _meet(self, path: str, source: Loader, state: State) -> None:
        known, first = self._entry(path), _digest(state)
        taken = any(entry is known for entry in self._taken)
        if known is not None and not known.renewed and not taken and known.first == first:
            source.revive(known.last)
            self._bind(source.owner(), known)
            return
        if known is not None:
            known.paths.remove(path)
        self._table[:] = [entry for entry in self._table if entry.paths]
        self._table.append(Lasting([path], first, state, renewed=known is not None))
        self._bind(source.owner(), self._table[-1])

    def _bind(self, owner: object, entry: Lasting) -> None:
        self._bound.append(_Bound(owner, entry))
        self._taken = [one for one in self._taken if one.paths] + [entry]

    def _entry(self, path: str) -> Lasting | None:
        return next((entry for entry in self._table if path in entry.paths), None)

    def _find(self, owner: object) -> _Bound | None:
        self._bound = [bound for bound in self._bound if bound.owner() is not None]
        return next((bound for bound in self._bound if bound.owner() is owner), None)


def _digest(state: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(state), digest_size=8).digest()
