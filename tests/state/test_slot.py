"""A slot holds the old content or the new one whatever happens to its writer."""

from __future__ import annotations

import errno
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys

import pytest

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.slot import Content, Slot

ENTRIES = 4096, 4096 + (1 << 14)
"""Where the two entries of a slot are."""
WRITER = """
import os, sys
from checkpointless_elastic.state.slot import Slot
slot = Slot.open(sys.argv[1])
number = int(sys.argv[2])
parts = {}
os.write(1, b"go")
while True:
    number += 1
    size = 8 * (1 + number * 7919 % 9000)
    blob = number.to_bytes(8, "little") * (size // 8)
    kept = {key: part for key, part in parts.items() if number % 3 and key > number - 3}
    parts = {**kept, number: number.to_bytes(8, "little") * (1 + number % 5 * 100)}
    slot.write(blob, parts)
    slot.append(blob[: size // 4 // 8 * 8 + 8])
    if number % 50 == 0:
        slot.clear_entries()
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "slot")


def killed_writer(path: str, start: int, reads: int) -> None:
    """Run a writer and kill it once its slot was read so many times, each time whole."""
    command = [sys.executable, "-c", WRITER, path, str(start)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.read(2) == b"go"
    with Slot.open(path) as slot:
        for _ in range(reads):
            content = slot.read()
            assert content is None or number_of_all(content) >= 0
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def number_of(blob: bytes) -> int:
    """The number that a whole blob consists of."""
    assert len(blob) % 8 == 0
    assert blob == blob[:8] * (len(blob) // 8), "the blob is a mix of two"
    return int.from_bytes(blob[:8], "little")


def number_of_all(content: Content) -> int:
    """The number of the blob; its last part has it too, those before it are of the writes before."""
    number = number_of(content.blob)
    for key, part in content.parts.items():
        assert number_of(part) == key
    assert list(content.parts) == list(range(number - len(content.parts) + 1, number + 1))
    return number


def test_a_new_slot_has_no_blob_and_no_entries(path: str) -> None:
    with Slot.create(path) as slot:
        assert slot.read() is None
        assert slot.entries() == []


def test_a_slot_is_private_to_its_user(path: str) -> None:
    Slot.create(path).close()
    assert {stat.S_IMODE(os.stat(one).st_mode) for one in (path, path + ".log")} == {0o600}


def test_a_slot_is_never_made_over_another(path: str) -> None:
    Slot.create(path).close()
    with pytest.raises(FileExistsError):
        Slot.create(path)


@pytest.mark.parametrize("sizes", [[0], [1, 2, 3], [10, 200_000, 10, 1_000_000, 3_000_000, 0, 5]])
def test_the_last_blob_is_read_whatever_its_size(path: str, sizes: list[int]) -> None:
    with Slot.create(path) as slot, Slot.open(path) as reader:
        for number, size in enumerate(sizes):
            blob = bytes([number]) * size
            slot.write(blob)
            assert reader.read() == slot.read() == Content(blob, {})


def test_each_writer_goes_on_where_the_one_before_it_was_lost(path: str) -> None:
    Slot.create(path).close()
    for turn in range(10):
        with Slot.open(path) as slot, Slot.open(path) as reader:
            for _ in range(3):
                slot.write(b"%d" % turn, {turn: b"part %d" % turn})
            slot.append(b"x")
            assert slot.read() == reader.read() == Content(b"%d" % turn, {turn: b"part %d" % turn})
            assert len(reader.entries()) == turn + 1


def test_parts_that_stay_are_not_written_again_and_others_share_the_room(path: str) -> None:
    with Slot.create(path) as slot, Slot.open(path) as reader:
        lasting = b"stays" * 1000
        for number in range(50):
            parts = {1: lasting, 2 + number: b"%d" % number * 500, 1000 + number // 2: b"small"}
            slot.write(b"blob %d" % number, parts)
            assert reader.read() == Content(b"blob %d" % number, parts)
        assert os.path.getsize(path) < 80_000


def test_writers_that_are_lost_again_and_again_leave_no_growing_file(path: str) -> None:
    Slot.create(path).close()
    for number in range(40):
        with Slot.open(path) as slot:
            for step in range(4):
                slot.write(
                    b"blob", {number * 5: b"%d" % number * 2000, number * 5 + step + 1: b"%d" % step * 2000}
                )
    assert os.path.getsize(path) < 120_000


def test_entries_come_back_in_order(path: str) -> None:
    with Slot.create(path) as slot:
        slot.append(b"a")
        slot.append(b"")
        slot.append(b"b" * 2_000_000)
        assert Slot.open(path).entries() == [b"a", b"", b"b" * 2_000_000]
        slot.clear_entries()
        slot.append(b"c")
        assert slot.entries() == [b"c"]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_torn_last_entry_is_ignored_and_overwritten(path: str, cut: int) -> None:
    with Slot.create(path) as slot:
        slot.append(b"whole")
        slot.append(b"torn")
    os.truncate(path + ".log", os.path.getsize(path + ".log") - cut)
    with Slot.open(path) as slot:
        assert slot.entries() == [b"whole"]
        slot.append(b"next")
        assert slot.entries() == [b"whole", b"next"]


@pytest.mark.parametrize("byte", range(40 + 4 + 3))  # the entry, no parts, the blob
def test_a_damaged_entry_gives_the_blob_before_it(path: str, byte: int) -> None:
    with Slot.create(path) as slot:
        slot.write(b"old")  # entry 1
        slot.write(b"new")  # entry 0
    with open(path, "r+b") as file:
        file.seek(ENTRIES[0] + byte)
        value = file.read(1)[0]
        file.seek(ENTRIES[0] + byte)
        file.write(bytes([value ^ 1]))
    assert Slot.open(path).read() == Content(b"old", {})


def test_a_first_write_that_was_torn_counts_as_none(path: str) -> None:
    Slot.create(path).close()
    with open(path, "r+b") as file:
        file.seek(ENTRIES[1])
        file.write(b"\1\0\0")
    assert Slot.open(path).read() is None


def test_a_slot_that_is_damaged_throughout_is_an_error(path: str) -> None:
    with Slot.create(path) as slot:
        slot.write(b"old")
        slot.write(b"new")
    with open(path, "r+b") as file:
        for entry in ENTRIES:
            file.seek(entry)
            file.write(b"x" * 20)
    with pytest.raises(StateMismatchError, match="damaged"):
        Slot.open(path).read()


def test_another_file_is_not_opened_as_a_slot(path: str) -> None:
    pathlib.Path(path).write_bytes(b"hello")
    with pytest.raises(StateMismatchError, match="not a slot"):
        Slot.open(path)


def test_a_writer_killed_at_any_moment_leaves_a_whole_blob(path: str) -> None:
    chance = random.Random(7)
    Slot.create(path).close()
    last = 0
    for _ in range(40):
        killed_writer(path, last, chance.randrange(1000))
        with Slot.open(path) as slot:
            content, entries = slot.read(), slot.entries()
        number = number_of_all(content) if content is not None else 0
        assert number >= last
        numbers = [number_of(entry) for entry in entries]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        last = number
        with Slot.open(path) as slot:
            slot.clear_entries()
    assert last > 100


def test_a_reader_beside_a_writer_never_sees_a_mix(path: str) -> None:
    Slot.create(path).close()
    command = [sys.executable, "-c", WRITER, path, "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.read(2)
        with Slot.open(path) as slot:
            seen = [number_of_all(content) for _ in range(500) if (content := slot.read()) is not None]
        assert seen == sorted(seen)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_full_file_system_is_an_error_that_says_what_to_do(path: str) -> None:
    with Slot.create(path) as slot:
        slot.write(b"old")
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OSError, match="cannot be written") as raised:
                slot.write(bytes(1_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert raised.value.errno == errno.EFBIG
        assert slot.read() == Content(b"old", {})


def test_a_slot_outlives_two_writes_in_a_row_that_were_torn_behind_their_entry(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two processes, each of which was killed when the first page of its record had been written."""
    parts = {1: b"a" * 2500}
    with Slot.create(path) as slot:
        slot.write(b"older" * 1600, parts)
        slot.write(b"whole" * 1600, parts)
    real = os.pwrite

    def torn(fd: int, data: bytes, offset: int) -> int:
        if len(data) <= 4096:
            return real(fd, data, offset)
        real(fd, data[:4096], offset)
        raise OSError(errno.EIO, "killed")

    for number in (2, 3):
        with Slot.open(path) as slot, monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", torn)
            with pytest.raises(OSError, match="killed"):
                slot.write(b"torn." * 1600, {number: b"b" * 2500})
    with Slot.open(path) as slot:
        content = slot.read()
        assert content is not None and content == (b"whole" * 1600, parts)
        slot.write(b"next." * 1600, {4: b"c" * 2500})
        assert slot.read() == (b"next." * 1600, {4: b"c" * 2500})
