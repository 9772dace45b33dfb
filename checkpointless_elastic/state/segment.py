"""Shared memory in which survivors put state for replacements: one file per transfer, mapped by everybody.

The owner creates the file in the run directory (mode 0600) and all its pages at once, so that a full tmpfs is an error
here and never a SIGBUS in the middle of a copy. Peers open it by its path. If a process dies, its mapping goes with it;
the file stays until the owner unlinks it, or the agent removes the run directory.
"""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from types import TracebackType

import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.run_dir import overflow

__all__ = ["Segment"]

_log = logging.getLogger(__name__)
_warned = False
_PAGE = mmap.PAGESIZE
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23


class Segment:
    """A mapped file. `bytes` is its content as a flat uint8 tensor.

    Attributes:
        path: the file; not necessarily in the directory asked for (see `create`).
        nbytes: usable size.
        bytes: live view of the memory; views of it keep the mapping alive after `close`.
    """

    def __init__(self, path: Path, nbytes: int, descriptor: int, owner: bool) -> None:
        self.path = path
        self.nbytes = nbytes
        self._owner = owner
        self._map: mmap.mmap | None = mmap.mmap(descriptor, max(nbytes, _PAGE))
        self.bytes: torch.Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]

    @classmethod
    def create(cls, directory: Path, name: str, nbytes: int) -> Segment:
        """Make the file and its pages. Blocks for some 0.35 ms per MiB while the kernel clears pages.

        Falls back to the temporary directory, with one warning per process, where `directory` has not enough room.
        Raises OSError (ENOSPC) if that is full too, FileExistsError if the name is taken.
        """
        path = _directory_with_room(directory, nbytes) / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, max(nbytes, _PAGE))
            return cls(path, nbytes, descriptor, owner=True)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)

    @classmethod
    def share(cls, directory: Path, name: str, nbytes: int, offset: int, length: int) -> Segment:
        """Map a segment that several processes fill; each makes the pages of its own part.

        Falls back as `create` does; peers that find different room end up in different files, which their paths show.
        Raises OSError (ENOSPC) if there is no room.
        """
        path = _room_for_parts(directory, nbytes) / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, max(nbytes, _PAGE))
            if length:
                os.posix_fallocate(descriptor, offset, length)
            return cls(path, nbytes, descriptor, owner=True)
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, path: Path, nbytes: int) -> Segment:
        """Map what `create` made. Raises FileNotFoundError if it is gone, StateMismatchError if it is too small."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(descriptor).st_size
            if size < max(nbytes, _PAGE):
                raise StateMismatchError(
                    f"Segment {path} has {size} bytes instead of {nbytes}: its owner failed."
                )
            return cls(path, nbytes, descriptor, owner=False)
        finally:
            os.close(descriptor)

    def memory(self) -> memoryview:
        """The same bytes for Python's own input and output. Not after `close`."""
        assert self._map is not None
        return memoryview(self._map)[: self.nbytes]

    def populate(self, offset: int = 0, length: int | None = None, write: bool = False) -> None:
        """Enter the pages into this process' page table ahead of the copy, some 0.07 ms per MiB.

        Without it the first touch of each page costs a fault. Does nothing on kernels before 5.14.
        """
        if self._map is None or not self.nbytes:
            return
        start = offset // _PAGE * _PAGE
        end = self.nbytes if length is None else offset + length
        try:
            self._map.madvise(_MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ, start, end - start)
        except OSError as error:
            _log.debug("This kernel cannot populate mappings (%s); pages are faulted in one by one.", error)

    def close(self) -> None:
        """Let go of the mapping (it ends with the last view of `bytes`). May be called twice."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map = None

    def unlink(self) -> None:
        """Remove the file's name, if this process created it. Mappings of peers stay valid."""
        if self._owner:
            self.path.unlink(missing_ok=True)
            self._owner = False

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.unlink()


def _room_for_parts(directory: Path, nbytes: int) -> Path:
    """`directory`, or its overflow if nothing like `nbytes` would fit."""
    room = os.statvfs(directory)
    if room.f_blocks * room.f_frsize >= 2 * nbytes:
        return directory
    return overflow(str(directory))


def _directory_with_room(directory: Path, nbytes: int) -> Path:
    """`directory`, or its overflow if the former's file system has not enough free space."""
    global _warned
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if free >= nbytes + _PAGE:
        return directory
    fallback = overflow(str(directory))
    if not _warned:
        _warned = True
        _log.warning(
            "%s has %d MiB free and the state needs %d MiB: using %s, which is slower; enlarge the shared memory.",
            directory, free >> 20, nbytes >> 20, fallback,
        )  # fmt: skip
    return fallback
