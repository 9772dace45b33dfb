"""What a guardian keeps of another node's mirrors: the two newest of each rank that are whole.

The bytes are in shared memory without a name, so that they go with this process, and what room they may take is that of
the file system. Connections fill it on threads of their own; a mirror counts from the moment that all of it is here.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from checkpointless_elastic.protocol.guarding import NONE, Put, Version
from checkpointless_elastic.state.segment import Segment

__all__ = ["Book", "Shelf"]

MOST = 2


@dataclass(eq=False)
class Book:
    """One mirror. ``files``: its memory. ``readers``: who sends it just now, so that it must not be written again."""

    put: Put
    files: list[Segment] = field(default_factory=list)
    readers: int = 0

    @property
    def step(self) -> int:
        return self.put.version[0]

    def memory(self) -> Iterator[memoryview]:
        """The bytes of each file."""
        for segment in self.files:
            yield segment.memory()


class Shelf:
    """Any thread may use it; no method waits for a peer."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = Path(run_dir)
        self._lock = threading.Lock()
        self._books: dict[int, list[Book]] = {}  # by rank, the older one first
        self._free: dict[int, list[Segment]] = {}  # by rank: of mirrors that were given up
        self._horizon: list[tuple[int, int]] = []  # of decisions: generation and step
        self._numbers = itertools.count()

    # ---- mirrors come

    def begin(self, put: Put) -> Book:
        """Room for a mirror that is to come; the older of two is given up. Raises OSError where there is no room."""
        with self._lock:
            books = self._books.setdefault(put.rank, [])
            while len(books) >= MOST:
                self._give_up(put.rank, books.pop(0))
            free = self._free.pop(put.rank, [])
        book = Book(put)
        try:
            for nbytes in put.sizes:
                book.files.append(_taken(free, nbytes) or self._segment(nbytes))
        except OSError:
            self.drop(book)
            raise
        return book

    def _segment(self, nbytes: int) -> Segment:
        segment = Segment.create(self._run_dir, f"ward-{next(self._numbers)}", nbytes)
        segment.unlink()
        return segment

    def keep(self, book: Book) -> bool:
        """All of it is here. False: it is of a run that was given up."""
        with self._lock:
            books = self._books.setdefault(book.put.rank, [])
            if not self._counts(book.put.version):
                self._give_up(book.put.rank, book)
                return False
            for other in [other for other in books if other.step >= book.step]:
                books.remove(other)
                self._give_up(book.put.rank, other)
            books.append(book)
            return True

    def drop(self, book: Book) -> None:
        """It did not come whole; its memory is for the next one."""
        with self._lock:
            self._give_up(book.put.rank, book)

    def _give_up(self, rank: int, book: Book) -> None:
        if not book.readers:
            self._free.setdefault(rank, []).extend(book.files)

    def _counts(self, version: Version) -> bool:
        step, begun = version
        return all(step <= target or begun >= generation for generation, target in self._horizon)

    # ---- what is here

    def has(self, rank: int, version: Version) -> bool:
        """Is this very mirror here?"""
        with self._lock:
            return any(book.put.version == version for book in self._books.get(rank, ()))

    def newest(self, ranks: Iterable[int]) -> dict[int, int]:
        """By rank, the step of the newest mirror; those without one are left out."""
        with self._lock:
            return {rank: self._books[rank][-1].step for rank in ranks if self._books.get(rank)}

    @contextmanager
    def reading(self, ranks: Iterable[int], step: int) -> Iterator[list[Book]]:
        """The mirrors of a step, which stay as they are meanwhile."""
        with self._lock:
            books = [book for rank in ranks for book in self._books.get(rank, ()) if book.step == step]
            for book in books:
                book.readers += 1
        try:
            yield books
        finally:
            with self._lock:
                for book in books:
                    book.readers -= 1

    # ---- what does not count any more

    def decided(self, generation: int, step: int) -> None:
        """All go on at this step: mirrors of later ones that were begun before are of a run that was given up."""
        with self._lock:
            self._horizon = [known for known in self._horizon if known[1] < step][-MOST:] + [
                (generation, step)
            ]
            for rank, books in self._books.items():
                for book in [book for book in books if not self._counts(book.put.version)]:
                    books.remove(book)
                    self._give_up(rank, book)

    def forget(self, generation: int) -> None:
        """Nothing counts that was begun before this generation."""
        self.decided(generation, NONE[0])
        with self._lock:
            self._free.clear()
            if generation == sys.maxsize:  # nothing at all; another seat may follow
                self._horizon.clear()


def _taken(free: list[Segment], nbytes: int) -> Segment | None:
    """Memory of this size, taken out of the list."""
    for segment in free:
        if segment.nbytes == nbytes:
            free.remove(segment)
            return segment
    return None
