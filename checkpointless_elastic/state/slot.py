"""A rank's private state, kept by its agent in shared memory, whole at every moment.

A slot is a file on tmpfs, mode 0600, that outlives the worker that writes it. It holds one blob that is replaced as a
whole, and beside it (PATH.log) a log that only grows. One process writes at a time; others may read meanwhile.

    header   magic and version (8 bytes), then two entries: sequence number, offset, capacity, length, CRC of the
             blob, CRC of the entry itself
    regions  one for each entry; a blob that does not fit gets a new region, twice its size, at the end of the file
    log      records: length and CRC of the payload, CRC of both, payload

A write goes to the region that is not current, and its entry is written last. A SIGKILL at any instruction therefore
leaves the old blob or the new one, since the page cache outlives the process. Files are written with pwrite and not
mapped: it costs 2 microseconds more for 30 kB, and a full tmpfs is then an error and not a SIGBUS.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from checkpointless_elastic.errors import StateMismatchError

__all__ = ["Slot"]

_MAGIC = b"CESLOT\x00\x01"
_ENTRY = struct.Struct("<QQQQI")
_CRC = struct.Struct("<I")
_ENTRY_BYTES = 64  # each entry in a cache line of its own
_REGIONS_START = 4096
_FIRST_CAPACITY = 1 << 16
_RECORD = struct.Struct("<QI")
_RECORD_BYTES = _RECORD.size + _CRC.size
_READ_ATTEMPTS = 100  # a reader that meets a writer this often in a row is not given bytes that may be mixed


class _Entry(NamedTuple):
    sequence: int
    offset: int
    capacity: int
    length: int
    crc: int


class Slot:
    """One rank's slot. Every method returns at once; none waits for another process."""

    def __init__(self, path: str, blob_fd: int, log_fd: int) -> None:
        self._path = path
        self._blob_fd = blob_fd
        self._log_fd = log_fd
        self._log_end: int | None = None

    @classmethod
    def create(cls, path: str) -> Slot:
        """Make an empty slot. FileExistsError if there is one already."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        log_fd = os.open(path + ".log", flags, 0o600)
        blob_fd = os.open(path + ".new", flags, 0o600)
        slot = cls(path, blob_fd, log_fd)
        slot._pwrite(blob_fd, _MAGIC + bytes(_REGIONS_START - len(_MAGIC)), 0)
        os.link(path + ".new", path)  # whole from the moment that it has its name
        os.unlink(path + ".new")
        return slot

    @classmethod
    def open(cls, path: str) -> Slot:
        """Open a slot that exists, to read it or to go on writing it. StateMismatchError if it is not a slot."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        blob_fd = os.open(path, flags)
        if os.pread(blob_fd, len(_MAGIC), 0) != _MAGIC:
            os.close(blob_fd)
            raise StateMismatchError(
                f"{path} is not a slot of this version; remove it and start the job anew."
            )
        return cls(path, blob_fd, os.open(path + ".log", flags))

    def write(self, blob: bytes) -> None:
        """Replace the blob as a whole; some 15 microseconds for 30 kB. OSError if the shared memory is full."""
        current, spare, index = self._sides()
        if spare.capacity < len(blob):
            spare = _region_behind(current, spare, len(blob))
        self._pwrite(self._blob_fd, blob, spare.offset)
        entry = _Entry(current.sequence + 1, spare.offset, spare.capacity, len(blob), zlib.crc32(blob))
        self._pwrite(self._blob_fd, _packed(entry), _position(index))

    def read(self) -> bytes | None:
        """The last blob that was written whole; None if there is none."""
        for _ in range(_READ_ATTEMPTS):
            entries = sorted((self._entry(0), self._entry(1)), reverse=True)
            for entry in entries:
                blob = os.pread(self._blob_fd, entry.length, entry.offset) if entry.sequence else b""
                if entry.sequence and len(blob) == entry.length and zlib.crc32(blob) == entry.crc:
                    return blob
            if self._never_written(0) and self._never_written(1):
                return None
        if self._never_written(0):  # the first write of all, which goes to entry 1, was torn
            return None
        raise StateMismatchError(f"The slot {self._path} is damaged or changes faster than it can be read.")

    def append(self, entry: bytes) -> None:
        """Add an entry to the log. OSError if the shared memory is full; the log is then as before."""
        end = self._end_of_log() if self._log_end is None else self._log_end
        head = _RECORD.pack(len(entry), zlib.crc32(entry))
        record = b"".join((head, _CRC.pack(zlib.crc32(head)), entry))
        self._pwrite(self._log_fd, record, end)
        self._log_end = end + len(record)

    def entries(self) -> list[bytes]:
        """All entries that were appended whole, in order."""
        return [payload for _, payload in self._records()]

    def clear_entries(self) -> None:
        """Empty the log."""
        os.ftruncate(self._log_fd, 0)
        self._log_end = 0

    def unlink(self) -> None:
        """Remove the files; whoever has them open can go on using them."""
        os.unlink(self._path)
        os.unlink(self._path + ".log")

    def close(self) -> None:
        """Let go of the files. The object cannot be used afterwards."""
        os.close(self._blob_fd)
        os.close(self._log_fd)

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sides(self) -> tuple[_Entry, _Entry, int]:
        """The current entry, the one to overwrite, and the latter's index."""
        first, second = self._entry(0), self._entry(1)
        return (first, second, 1) if first.sequence >= second.sequence else (second, first, 0)

    def _entry(self, index: int) -> _Entry:
        """An entry, or one of sequence 0 if it was never written or is torn."""
        raw = os.pread(self._blob_fd, _ENTRY.size + _CRC.size, _position(index))
        body, crc = raw[: _ENTRY.size], raw[_ENTRY.size :]
        if len(crc) != _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(body):
            return _Entry(0, 0, 0, 0, 0)
        return _Entry(*_ENTRY.unpack(body))

    def _never_written(self, index: int) -> bool:
        return not any(os.pread(self._blob_fd, _ENTRY_BYTES, _position(index)))

    def _end_of_log(self) -> int:
        """Where the last whole record ends: what a dead writer left behind it is overwritten."""
        end = max((end for end, _ in self._records()), default=0)
        os.ftruncate(self._log_fd, end)
        return end

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """End and payload of each whole record."""
        at = 0
        while len(head := os.pread(self._log_fd, _RECORD_BYTES, at)) == _RECORD_BYTES:
            length, crc = _RECORD.unpack_from(head)
            if _CRC.unpack_from(head, _RECORD.size)[0] != zlib.crc32(head[: _RECORD.size]):
                return
            payload = os.pread(self._log_fd, length, at + _RECORD_BYTES)
            if len(payload) != length or zlib.crc32(payload) != crc:
                return
            at += _RECORD_BYTES + length
            yield at, payload

    def _pwrite(self, fd: int, data: bytes, offset: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(fd, data[done:] if done else data, offset + done)
        except OSError as error:
            advice = "make the file system larger, or choose another directory for the job's run files"
            raise OSError(
                error.errno, f"The slot {self._path} cannot be written ({error}); {advice}."
            ) from error


def _region_behind(current: _Entry, spare: _Entry, length: int) -> _Entry:
    """A new region behind both. The file is sparse: memory is used as it is written."""
    end = max(_REGIONS_START, current.offset + current.capacity, spare.offset + spare.capacity)
    return _Entry(0, end, max(_FIRST_CAPACITY, 2 * length), 0, 0)


def _position(index: int) -> int:
    return _ENTRY_BYTES * (1 + index)


def _packed(entry: _Entry) -> bytes:
    body = _ENTRY.pack(*entry)
    return body + _CRC.pack(zlib.crc32(body))
