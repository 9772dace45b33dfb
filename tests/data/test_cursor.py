"""The cursor keeps what a replacement needs within its limits, and survives the slot unchanged."""

from __future__ import annotations

import msgspec
import pytest

from checkpointless_elastic.data.cursor import KEPT_BYTES, KEPT_RNG, VERSION, Cursor
from checkpointless_elastic.data.resume import Join, Resume, Skip
from checkpointless_elastic.errors import ProtocolError, ScriptMismatchError
from checkpointless_elastic.worker import rng


def filled() -> Cursor:
    cursor = Cursor.new()
    cursor.issued("world", "broadcast", b"id")
    outer = cursor.enter("epochs", rng.capture())
    cursor.start(outer, rng.capture(), (b"state",))
    cursor.commit(b"epoch", rng.capture())
    inner = cursor.enter("batches", rng.capture(), (b"x",))
    cursor.start(inner, rng.capture())
    cursor.commit(None)
    cursor.issued("world", "all_reduce", None)
    return cursor


def test_a_cursor_survives_encoding_unchanged() -> None:
    cursor = filled()
    assert Cursor.decode(cursor.encode()) == cursor


def test_a_cursor_of_another_version_is_refused() -> None:
    cursor = filled()
    cursor.version = VERSION + 1
    with pytest.raises(ProtocolError, match=f"version {VERSION + 1}"):
        Cursor.decode(cursor.encode())


@pytest.mark.parametrize("blob", [b"", b"garbage", msgspec.msgpack.encode([VERSION, [], []])])
def test_a_damaged_cursor_is_refused(blob: bytes) -> None:
    with pytest.raises(ProtocolError, match="The cursor in the slot"):
        Cursor.decode(blob)
    with pytest.raises(ProtocolError):
        Cursor.decode(filled().encode()[:-3])


def test_a_return_value_over_the_limit_is_marked_missing() -> None:
    cursor = Cursor.new()
    cursor.commit(b"x" * (KEPT_BYTES + 1))
    cursor.commit(b"x" * KEPT_BYTES)
    cursor.commit(None)
    assert [call.missing for call in cursor.top.calls] == [True, False, True]


def test_the_oldest_values_of_an_iteration_make_room_for_new_ones() -> None:
    cursor = Cursor.new()
    for number in range(10):
        cursor.commit(bytes([number]) * (KEPT_BYTES // 4))
    assert [call.missing for call in cursor.top.calls] == [True] * 6 + [False] * 4


def test_a_cursor_stays_small_in_an_iteration_of_many_calls() -> None:
    cursor = Cursor.new()
    for _ in range(10_000):
        cursor.commit(b"a loss of some bytes", rng.capture())
    assert sum(call.rng is not None for call in cursor.top.calls) == KEPT_RNG
    assert len(cursor.encode()) < 600_000


def test_the_next_iteration_clears_what_the_last_one_kept_but_not_what_the_iterator_needs() -> None:
    cursor = Cursor.new()
    frame = cursor.enter("batches")
    cursor.issued("g", "while the iterator is created", None)
    fetch = len(frame.outside)
    cursor.issued("g", "while item 0 is fetched", None)
    cursor.start(frame, outside_from=fetch)
    cursor.issued("g", "in the body", None)
    cursor.commit(b"1")
    fetch = len(frame.outside)
    cursor.issued("g", "while item 1 is fetched", None)
    cursor.start(frame, outside_from=fetch)
    assert [one.op for one in frame.outside] == ["while the iterator is created", "while item 1 is fetched"]
    assert frame.calls == []
    assert frame.position == 1


def test_a_walk_answers_from_the_record_and_then_joins() -> None:
    record = filled()
    before = record.encode()
    walk = Resume(record)
    entry = walk.next_outside("world", "broadcast")
    assert entry is not None
    assert entry.output == b"id"
    assert not walk.in_loop
    outer = walk.next_loop("epochs")
    assert walk.in_loop
    assert outer is record.stack[1]
    skip = walk.next_call()
    assert isinstance(skip, Skip)
    assert skip.value == b"epoch"
    assert walk.next_loop("batches") is record.stack[2]
    missing = walk.next_call()
    assert isinstance(missing, Skip)
    assert missing.missing
    assert walk.next_outside("world", "all_reduce") is not None
    assert not walk.live
    assert isinstance(walk.next_call(), Join)
    assert walk.live
    assert walk.next_loop("steps") is None
    assert walk.next_outside("world", "barrier") is None
    assert record.encode() == before


def test_another_collective_than_the_recorded_one_is_a_mismatch() -> None:
    with pytest.raises(
        ScriptMismatchError, match="calls barrier on group world .* had called broadcast on world"
    ):
        Resume(filled()).next_outside("world", "barrier")


def test_a_call_before_the_recorded_loop_is_a_mismatch() -> None:
    walk = Resume(filled())
    walk.next_outside("world", "broadcast")
    walk.next_loop("epochs")
    walk.next_call()
    with pytest.raises(ScriptMismatchError, match="makes replayable call 1 in iteration 0 of epochs"):
        walk.next_call()
