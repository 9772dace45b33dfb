"""The loops of a Run: plain loops without a session; with one, loops that note where they are and resume
there.

A loop notes each iteration in the session's cursor after its item was fetched and before it is yielded, and
has the cursor saved then. In a replacement it asks the record where to resume: it makes its iterator under
the random state that the lost rank made it with, stands it before the recorded item without loading what was
consumed, puts back the random state of that moment and fetches the item again.

What a replacement has to find in the iteration it resumes at must be made in that iteration or before the
loop: a variable that is carried from one iteration to the next is not brought back, unless it belongs to what
must survive. A count is such a variable: hence `numbered`.

All of it runs on the main thread. Leaving a loop is noted but not saved: a rank that dies of an exception is
replaced where the exception was raised, and not behind the loops that it unwound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from checkpointless_elastic.data import carried
from checkpointless_elastic.data.cursor import Cursor, Frame
from checkpointless_elastic.data.resume import Resume
from checkpointless_elastic.data.skipping import too_short
from checkpointless_elastic.data.source import Numbers, Source, source_of
from checkpointless_elastic.errors import ScriptMismatchError
from checkpointless_elastic.worker import rng

__all__ = ["LoopHost", "batches", "epochs", "numbered", "steps"]

T = TypeVar("T")
U = TypeVar("U")


class LoopHost(Protocol):
    """What the loops need of the session."""

    @property
    def cursor(self) -> Cursor:
        """Where this rank is. In a replacement, from `before_first_use` on, that of the rank it replaces."""

    @property
    def resume(self) -> Resume | None:
        """The walk over the record in a replacement that has not joined; None otherwise."""

    def before_first_use(self) -> None:
        """A loop is about to be entered. A replacement blocks here until its state is there."""

    def fetch_begins(self, frame: Frame) -> None:
        """The next item of this loop is about to be fetched."""

    def fetch_ended(self) -> None:
        """It was, or there is none."""

    def iteration_started(self) -> None:
        """An item was fetched and noted, and is about to be yielded (again, in a replacement)."""

    def save(self) -> None:
        """Persist the cursor to the slot."""


def epochs(n: int, host: LoopHost | None = None) -> Iterator[int]:
    """Yield 0 to n - 1, one for each pass over the data."""
    return _plain(range(n)) if host is None else _loop("epochs", Numbers(n), host, _item)


def steps(n: int, host: LoopHost | None = None) -> Iterator[int]:
    """Yield 0 to n - 1, one for each step."""
    return _plain(range(n)) if host is None else _loop("steps", Numbers(n), host, _item)


def batches(loader: Iterable[T], host: LoopHost | None = None) -> Iterator[T]:
    """Yield the items of one pass over `loader`; `data/source.py` says what resumes exactly."""
    return _plain(loader) if host is None else _loop("batches", source_of(loader), host, _item)


def numbered(loader: Iterable[T], host: LoopHost | None = None) -> Iterator[tuple[int, T]]:
    """As `batches`, with the number of each item; `enumerate` would start at 0 again in a replacement."""
    return _plain_numbered(loader) if host is None else _loop("batches", source_of(loader), host, _pair)


def _plain(items: Iterable[T]) -> Iterator[T]:
    """As with a session, nothing happens before the first item is asked for."""
    yield from items


def _plain_numbered(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    yield from enumerate(items)


def _item(position: int, item: T) -> T:
    return item


def _pair(position: int, item: T) -> tuple[int, T]:
    return position, item


def _loop(kind: str, source: Source[T], host: LoopHost, give: Callable[[int, T], U]) -> Iterator[U]:
    host.before_first_use()
    record = None if host.resume is None else host.resume.next_loop(kind)
    if record is None:
        host.cursor.loaders.entering(host.cursor.next_path, source)
        frame = host.cursor.enter(kind, rng.capture(), source.lasting(), source.dealing())
    else:
        frame = record
        if not frame.finished:
            frame.dealing = source.dealing()
        host.cursor.loaders.met_again(frame.path, source)
    replayed = frame.finished
    end: rng.RngState | None = None
    try:
        if record is None:
            source.open()
        else:
            yield from _recorded(record, source, host, give)
        if not frame.finished:
            yield from _live(frame, source, host, give)
            end = rng.capture()
        _check_left(frame, host)
    finally:
        host.cursor.loaders.leaving(source, replayed)
        _leave(frame, end, host)


def _recorded(frame: Frame, source: Source[T], host: LoopHost, give: Callable[[int, T], U]) -> Iterator[U]:
    """Yield the recorded iteration once more, or nothing if there was none, then put its random state
    back."""
    if frame.compact:
        return
    if frame.rng_create is not None:
        rng.restore(frame.rng_create)
    if frame.position < 0:
        source.revive(frame.source_create)
        source.open()
    else:
        _reopen(frame, source, host.resume)
        if frame.rng_start is not None:
            rng.restore(frame.rng_start)
        try:
            item = [source.fetch()]
        except StopIteration as error:
            raise ScriptMismatchError(too_short(frame.position, frame.position + 1)) from error
        if host.resume is not None and host.resume.real:
            frame.fetched = host.resume.outside_done(frame) - frame.setup
        host.iteration_started()
        yield give(frame.position, item.pop())  # no reference stays here: the body may want the memory back
    if frame.rng_end is not None:
        _exhaust(frame, source)
        rng.restore(frame.rng_end)


def _reopen(frame: Frame, source: Source[T], resume: Resume | None) -> None:
    if resume is None:
        source.reopen(frame)
        return
    resume.remaking = not resume.real
    source.reopen(frame)
    resume.remaking = False
    if resume.real:
        frame.setup = resume.outside_done(frame)
    elif frame.position > 0:
        frame.made_again(resume.outside_done(frame))


def _exhaust(frame: Frame, source: Source[T]) -> None:
    """Ask for the item that is not there, as the lost rank did: samplers and loaders draw and tidy up
    then."""
    try:
        source.fetch()
    except StopIteration:
        return
    raise ScriptMismatchError(
        f"The loader of {frame.kind} (loop {frame.ordinal}) goes on after the {frame.position + 1} items that the lost "
        "rank was given; let it give the same items in each run of the script."
    )


def _live(frame: Frame, source: Source[T], host: LoopHost, give: Callable[[int, T], U]) -> Iterator[U]:
    waits = not isinstance(source, Numbers)  # for data, which may not come
    while True:
        resume = host.resume
        outside = len(frame.outside) if resume is None else resume.outside_done(frame)
        before = rng.capture(), source.state(), outside
        if carried.made:
            carried.end(frame.path, frame.kind)
        if waits:
            host.fetch_begins(frame)
        try:
            item = [source.fetch()]
        except StopIteration:
            return
        finally:
            if waits:
                host.fetch_ended()
        if host.resume is not None:
            host.resume.going_on(frame)
        host.cursor.start(frame, *before)
        if carried.made:
            carried.begin(frame.path)
        host.iteration_started()
        host.save()
        yield give(frame.position, item.pop())


def _check_left(frame: Frame, host: LoopHost) -> None:
    if host.resume is not None:
        host.resume.leaving(frame)
        host.resume.check()


def _leave(frame: Frame, end: rng.RngState | None, host: LoopHost) -> None:
    if host.resume is not None:
        host.resume.leaving(frame)
    if not frame.finished:
        host.cursor.leave(frame, end)
