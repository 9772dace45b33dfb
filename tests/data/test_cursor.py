"""The cursor keeps what a replacement needs within its limits, and survives the slot unchanged."""

from __future__ import annotations

import msgspec
import pytest

from checkpointless_elastic.data.cursor import CALL_BYTES, KEPT_BYTES, KEPT_RNG, Cursor, Outside
from checkpointless_elastic.data.lasting import Kept
from checkpointless_elastic.data.resume import Join, Resume, Skip
from checkpointless_elastic.errors import ProtocolError, ScriptMismatchError
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import rng
from checkpointless_elastic.worker.packing import pack, unpack


def filled() -> Cursor:
    cursor = Cursor.new()
    cursor.issued(Outside("world", "broadcast", b"id"))
    outer = cursor.enter("epochs", rng.capture())
    cursor.start(outer, rng.capture(), (b"state",))
    cursor.commit(b"epoch", rng.capture())
    inner = cursor.enter("batches", rng.capture(), Kept((b"x",), counters={"loader.passes": 3}))
    cursor.start(inner, rng.capture())
    cursor.commit(None)
    cursor.issued(Outside("world", "all_reduce", None))
    return cursor


def test_a_cursor_survives_encoding_unchanged() -> None:
    cursor = filled()
    assert unpack(pack(cursor), Cursor) == cursor


@pytest.mark.parametrize("blob", [b"", b"garbage", msgspec.msgpack.encode([[], [7, []]])])
def test_a_damaged_cursor_is_refused(blob: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        unpack(Content(blob, {}), Cursor)
    whole = pack(filled())
    with pytest.raises(ProtocolError, match="cannot be read"):
        unpack(Content(whole.blob[:-3], whole.parts), Cursor)


def test_the_oldest_values_of_an_iteration_make_room_for_new_ones() -> None:
    cursor = Cursor.new()
    for number in range(10):
        cursor.commit(bytes([number]) * (KEPT_BYTES // 4 - CALL_BYTES))
    frame = cursor.top
    assert (frame.committed, frame.earlier) == (10, 6)
    assert [frame.call(number).missing for number in range(10)] == [True] * 6 + [False] * 4


def test_the_last_value_is_kept_however_large_it_is() -> None:
    cursor = Cursor.new()
    cursor.commit(b"small")
    cursor.commit(b"x" * 2 * KEPT_BYTES)
    assert [cursor.top.call(number).missing for number in range(2)] == [True, False]


def test_a_cursor_stays_small_in_an_iteration_of_many_calls() -> None:
    cursor = Cursor.new()
    for _ in range(10_000):
        cursor.commit(b"a loss of some bytes", rng.capture())
    assert sum(call.rng is not None for call in cursor.top.calls) == KEPT_RNG
    packed = pack(cursor)
    assert len(packed.blob) < 300_000


def test_the_next_iteration_clears_what_the_last_one_kept_but_not_what_the_iterator_needs() -> None:
    cursor = Cursor.new()
    frame = cursor.enter("batches")
    cursor.issued(Outside("g", "while the iterator is created", None))
    fetch = len(frame.outside)
    cursor.issued(Outside("g", "while item 0 is fetched", None))
    cursor.start(frame, outside_from=fetch)
    cursor.issued(Outside("g", "in the body", None))
    cursor.commit(b"1")
    fetch = len(frame.outside)
    cursor.issued(Outside("g", "while item 1 is fetched", None))
    cursor.start(frame, outside_from=fetch)
    assert [one.op for one in frame.outside] == ["while the iterator is created", "while item 1 is fetched"]
    assert frame.calls == []
    assert frame.position == 1


def test_a_walk_answers_from_the_record_and_then_joins() -> None:
    record = filled()
    before = pack(record)
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
    assert pack(record) == before


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
