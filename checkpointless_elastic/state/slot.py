"""A rank's private state, kept by its agent in shared memory, whole at every moment.

A slot is a file on tmpfs, mode 0600, that outlives the worker that writes it. It holds one blob and the parts that
the blob names, replaced as a whole, and beside it (PATH.log) a log that only grows. One process writes at a time;
others may read meanwhile.

    header   magic and version (8 bytes)
    entries  two, each in a region of its own: sequence number, offset, capacity, length and CRC of its record, CRC of
             the entry itself. The record stands right behind it, or, if it is too long for that, at the offset, in
             a piece of the file that this entry keeps, twice the size of its first record there
    record   how many parts, then number, offset, length and CRC of each, the blob
    cells    one part each
    log      records: length and CRC of the payload, CRC of both, payload

A part that the last write had too (the same number) stays where it is. Everything else goes to the older entry and to
cells that the current record does not use; entry and record are written in one go. A SIGKILL at any instruction
therefore leaves the old content or the new one, since the page cache outlives the process. Files are written with
pwrite and not mapped: it costs 2 microseconds more for 30 kB, and a full tmpfs is then an error and not a SIGBUS.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import NamedTuple

from checkpointless_elastic.errors import StateMismatchError

__all__ = ["Content", "Slot"]

_MAGIC = b"CESLOT\x00\x03"
_ENTRY = struct.Struct("<QQQQI")
_CRC = struct.Struct("<I")
_ENTRY_BYTES = _ENTRY.size + _CRC.size
_ENTRIES_START = 4096
_ENTRY_REGION = 1 << 14  # an entry and what stands right behind it
_INLINE = _ENTRY_REGION - _ENTRY_BYTES
_CELLS_START = _ENTRIES_START + 2 * _ENTRY_REGION
_COUNT = struct.Struct("<I")
_ROW = struct.Struct("<QQQI")
_CELL_ALIGNMENT = 64
_NO_PARTS: Mapping[int, bytes] = MappingProxyType({})
_RECORD = struct.Struct("<QI")
_RECORD_BYTES = _RECORD.size + _CRC.size
_READ_ATTEMPTS = 100  # a reader that meets a writer this often in a row is not given bytes that may be mixed


class _Entry(NamedTuple):
    sequence: int
    offset: int
    capacity: int
    length: int
    crc: int


class Content(NamedTuple):
    """What a slot holds.

    Attributes:
        blob: whatever the rank wrote.
        parts: what the blob refers to by number.
    """

    blob: bytes
    parts: Mapping[int, bytes]


class Slot:
    """One rank's slot. Every method returns at once; none waits for another process.

    Attributes:
        sequence: number of the content that was last read or written here, from 1.
    """

    def __init__(self, path: str, blob_fd: int, log_fd: int) -> None:
        self._path = path
        self._blob_fd = blob_fd
        self._log_fd = log_fd
        self.sequence = 0
        self._log_end: int | None = None
        # What the next write starts from; None and empty until this process, which writes alone, has written.
        self._written: tuple[_Entry, _Entry, int] | None = None  # see `_begin`
        self._rows: dict[int, bytes] = {}  # where the parts are, by number, as the current record says it
        self._free: dict[int, list[int]] = {}  # by capacity, offsets of cells that are in no use
        self._gaps: list[tuple[int, int]] = []  # start and end of what is not handed out

    @classmethod
    def create(cls, path: str) -> Slot:
        """Make an empty slot. FileExistsError if there is one already."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        log_fd = os.open(path + ".log", flags, 0o600)
        blob_fd = os.open(path + ".new", flags, 0o600)
        slot = cls(path, blob_fd, log_fd)
        slot._pwrite(blob_fd, _MAGIC + bytes(_ENTRIES_START - len(_MAGIC)), 0)
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

    def write(self, blob: bytes, parts: Mapping[int, bytes] = _NO_PARTS) -> None:
        """Replace the content as a whole; some 5 microseconds if the parts are those of the last write.

        A number stands for the same part for good. OSError if the shared memory is full.
        """
        current, spare, index = self._written or self._begin()
        rows = known = self._rows
        if parts.keys() != known.keys():
            rows = {}
            for number, part in parts.items():
                rows[number] = known[number] if number in known else self._place(number, part)
        record = b"".join([_COUNT.pack(len(rows)), *rows.values(), blob])
        where, inline = spare, len(record) <= _INLINE
        if not inline and spare.capacity < len(record):
            where = _Entry(0, *self._extend(2 * len(record)), 0, 0)
        entry = _Entry(current.sequence + 1, where.offset, where.capacity, len(record), zlib.crc32(record))
        self._written = None
        if not inline:
            self._pwrite(self._blob_fd, record, entry.offset)
        self._pwrite(self._blob_fd, _packed(entry) + record if inline else _packed(entry), _position(index))
        self._written = entry, current, 1 - index
        self.sequence = entry.sequence
        if rows is not known:
            for number, row in known.items():
                if number not in rows:  # the current record does not name it any more
                    _, offset, length, _ = _ROW.unpack(row)
                    self._free.setdefault(_aligned(length), []).append(offset)
            self._rows = rows

    def read(self) -> Content | None:
        """The last content that was written whole; None if there is none."""
        for _ in range(_READ_ATTEMPTS):
            for entry, index in sorted(((self._entry(0), 0), (self._entry(1), 1)), reverse=True):
                content = self._content(entry, index) if entry.sequence else None
                if content is not None:
                    self.sequence = entry.sequence
                    return content
            if self._never_written(0) and self._never_written(1):
                return None
        if self._never_written(0):  # the first write of all, which goes to entry 1, was torn
            return None
        raise StateMismatchError(f"The slot {self._path} is damaged or changes faster than it can be read.")

    def room(self, log: bool) -> int:
        """Bytes of the file, and of that of the log: what is in them has no more. Does not read them."""
        return os.fstat(self._blob_fd).st_size + (os.fstat(self._log_fd).st_size if log else 0)

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

    def _begin(self) -> tuple[_Entry, _Entry, int]:
        """The current entry, the one to overwrite and its index: for the first write, or one after a failed write."""
        found = [(self._entry(1), 1), (self._entry(0), 0)]
        found.sort(key=lambda one: (self._content(*one) is not None, one[0].sequence))
        (spare, index), (current, where) = found  # the newer one may be torn behind its entry
        record = self._record(current, where)
        rows = _split(record)[0] if record is not None else []
        self._rows = {row[0]: _ROW.pack(*row) for row in rows}
        self._free.clear()
        taken = [(one.offset, one.capacity) for one in (current, spare)]
        self._gaps = _gaps([*taken, *((offset, _aligned(length)) for _, offset, length, _ in rows)])
        return current, spare, index

    def _place(self, number: int, part: bytes) -> bytes:
        """Write a part into a free cell. Its row."""
        free = self._free.get(_aligned(len(part)))
        offset = free.pop() if free else self._extend(len(part))[0]
        self._pwrite(self._blob_fd, part, offset)
        return _ROW.pack(number, offset, len(part), zlib.crc32(part))

    def _extend(self, length: int) -> tuple[int, int]:
        """Offset and capacity of a piece of the file that was not handed out yet."""
        wanted = _aligned(length)
        number = next(n for n, (start, stop) in enumerate(self._gaps) if stop - start >= wanted)
        start, stop = self._gaps[number]
        self._gaps[number] = start + wanted, stop
        return start, wanted

    def _content(self, entry: _Entry, index: int) -> Content | None:
        """What an entry stands for; None if any of it is torn or has been written over."""
        record = self._record(entry, index)
        if record is None:
            return None
        rows, blob = _split(record)
        parts = {number: os.pread(self._blob_fd, length, offset) for number, offset, length, _ in rows}
        if any(zlib.crc32(parts[number]) != crc for number, _, _, crc in rows):
            return None
        return Content(blob, parts)

    def _record(self, entry: _Entry, index: int) -> bytes | None:
        """The record that an entry names; None if it is torn or there is none."""
        inline = entry.length <= _INLINE
        record = os.pread(
            self._blob_fd, entry.length, _position(index) + _ENTRY_BYTES if inline else entry.offset
        )
        whole = entry.sequence > 0 and len(record) == entry.length and zlib.crc32(record) == entry.crc
        return record if whole else None

    def _entry(self, index: int) -> _Entry:
        """An entry, or one of sequence 0 if it was never written or is torn."""
        raw = os.pread(self._blob_fd, _ENTRY_BYTES, _position(index))
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
        try:
            done = os.pwrite(fd, data, offset)
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            advice = "make the file system larger, or choose another directory for the job's run files"
            raise OSError(
                error.errno, f"The slot {self._path} cannot be written ({error}); {advice}."
            ) from error


def _aligned(length: int) -> int:
    return -(-length // _CELL_ALIGNMENT) * _CELL_ALIGNMENT


def _gaps(taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end of what lies between these offsets and lengths; the last one has no end."""
    found = []
    end = _CELLS_START
    for offset, length in sorted(taken):
        if offset > end:
            found.append((end, offset))
        end = max(end, offset + length)
    return [*found, (end, sys.maxsize)]


def _split(record: bytes) -> tuple[list[tuple[int, ...]], bytes]:
    """Number, offset, length and CRC of each part, and the blob."""
    end = _COUNT.size + _COUNT.unpack_from(record)[0] * _ROW.size
    return list(_ROW.iter_unpack(record[_COUNT.size : end])), record[end:]


def _position(index: int) -> int:
    return _ENTRIES_START + _ENTRY_REGION * index


def _packed(entry: _Entry) -> bytes:
    body = _ENTRY.pack(*entry)
    return body + _CRC.pack(zlib.crc32(body))
