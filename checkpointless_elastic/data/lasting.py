"""What a loader keeps from one pass to the next: its own generators, how often it was used, living worker processes.

While a loop is in the cursor its frame says all this. Between two passes over the same loader there is no
frame, so the cursor has a table of it: one entry for each loader, found by the places in the script
(`Frame.path`) that use it. A replacement that enters such a place for the first time takes the entry up, if
its loader is as that of the lost rank was at its first pass. A loader that is made anew for each pass is told
from one that is used again by the object, from its second pass on; before that, one whose generator starts
the same each time is taken for one that is used again.

What the script itself sets between two passes (`set_epoch`) is left as the script has set it."""

from __future__ import annotations

import hashlib
import weakref
from typing import Protocol

import msgspec

__all__ = ["Kept", "Lasting", "Loader", "Loaders"]


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What one loader keeps between two passes.

    Attributes:
        generators: states of its own generators.
        lives: of each DataLoader with persistent workers in it, whether they live on.
        counters: what it counts of its passes, by place and name, see `data.parts`.
    """

    generators: tuple[bytes, ...] = ()
    lives: tuple[bool, ...] = ()
    counters: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.generators or self.lives or self.counters)


class Lasting(msgspec.Struct, array_like=True):
    """One loader.

    Attributes:
        paths: the places in the script that use it.
        first: digest of its generators and its life when it was first used.
        counted: its counters then.
        last: what it kept when it was last left.
        renewed: another object is used at each pass.
    """

    paths: list[str]
    first: bytes
    counted: dict[str, int]
    last: Kept
    renewed: bool = False


class Loader(Protocol):
    """The side of a source that lasts."""

    def owner(self) -> object:
        """The loader itself."""

    def lasting(self) -> Kept:
        """What the loader keeps between two passes; False if nothing."""

    def revive(self, kept: Kept) -> None:
        """Bring the loader to this, without drawing from any generator of the process."""


class _Bound:
    """A loader of this process that is known to be that of an entry."""

    def __init__(self, owner: object, entry: Lasting) -> None:
        self.owner = weakref.ref(owner)
        self.entry = entry
        self.replayed: Kept | None = None  # what it kept after a loop that was only met again


class Loaders:
    """Which loaders of this process belong to which entries of the cursor's table. Main thread only."""

    def __init__(self, table: list[Lasting]) -> None:
        self._table = table
        self._bound: list[_Bound] = []
        self._taken: list[Lasting] = []  # entries whose loader was met, even if it is gone since

    def entering(self, path: str, source: Loader) -> None:
        """A loop over this loader is entered for the first time here: bring the loader to where it was
        left."""
        kept = _lasting(source)
        if not kept:
            return
        bound = self._find(source.owner())
        if bound is None:
            self._meet(path, source, kept)
            return
        if bound.replayed is not None:
            source.revive(_brought_up(kept, bound.replayed, bound.entry.last))
        bound.replayed = None
        if path not in bound.entry.paths:
            bound.entry.paths.append(path)

    def met_again(self, path: str, source: Loader) -> None:
        """A recorded loop over this loader is entered; its frame says where the loader was."""
        entry = self._entry(path)
        if entry is not None and _lasting(source) and self._find(source.owner()) is None:
            self._bind(source.owner(), entry)

    def leaving(self, source: Loader, replayed: bool) -> None:
        """A loop over this loader is left."""
        kept = _lasting(source)
        bound = self._find(source.owner()) if kept else None
        if bound is None:
            return
        bound.replayed = kept if replayed else None
        if not replayed:
            bound.entry.last = kept

    def _meet(self, path: str, source: Loader, kept: Kept) -> None:
        known, first = self._entry(path), _digest(kept)
        taken = any(entry is known for entry in self._taken)
        if known is not None and not known.renewed and not taken and known.first == first:
            made = msgspec.structs.replace(kept, counters=known.counted)
            source.revive(_brought_up(kept, made, known.last))
            self._bind(source.owner(), known)
            return
        if known is not None:
            known.paths.remove(path)
        self._table[:] = [entry for entry in self._table if entry.paths]
        self._table.append(Lasting([path], first, kept.counters, kept, renewed=known is not None))
        self._bind(source.owner(), self._table[-1])

    def _bind(self, owner: object, entry: Lasting) -> None:
        self._bound.append(_Bound(owner, entry))
        self._taken = [one for one in self._taken if one.paths] + [entry]

    def _entry(self, path: str) -> Lasting | None:
        return next((entry for entry in self._table if path in entry.paths), None)

    def _find(self, owner: object) -> _Bound | None:
        self._bound = [bound for bound in self._bound if bound.owner() is not None]
        return next((bound for bound in self._bound if bound.owner() is owner), None)


def _lasting(source: Loader) -> Kept:
    """Nothing of a loader that cannot be told from another one later."""
    return source.lasting() if type(source.owner()).__weakrefoffset__ else Kept()


def _brought_up(now: Kept, then: Kept, last: Kept) -> Kept:
    """`last`, apart from what the script has changed since the loader was as in `then`."""
    drawn = (now.generators, now.lives) != (then.generators, then.lives)
    generators, lives = (now.generators, now.lives) if drawn else (last.generators, last.lives)
    untouched = {
        name: number
        for name, number in last.counters.items()
        if now.counters.get(name) == then.counters.get(name)
    }
    return Kept(generators, lives, {**now.counters, **untouched})


def _digest(kept: Kept) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode((kept.generators, kept.lives)), digest_size=8).digest()
