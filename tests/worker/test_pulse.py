"""What a worker writes of itself, and what its agent reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from checkpointless_elastic.protocol.hangs import Activity
from checkpointless_elastic.worker.pulse import ENOUGH, Monitor, Pulse, pulse_path


@pytest.fixture
def path(tmp_path: Path) -> str:
    return pulse_path(str(tmp_path), 3)


def call(pulse: Pulse, seconds: float = 0.0, *, learn: bool = True) -> None:
    pulse.begin(Activity.CALL, "train", 1)
    time.sleep(seconds)
    pulse.end(2, learn=learn)


def test_nothing_is_expected_before_a_worker_has_written(path: str) -> None:
    assert Monitor(path).read().activity is Activity.SETUP


def test_a_limit_is_known_after_some_calls_and_is_that_of_the_longest(path: str) -> None:
    pulse, monitor = Pulse(path), Monitor(path)
    call(pulse, 0.2)  # the first one does not count
    for number in range(ENOUGH):
        pulse.begin(Activity.CALL, "train", 1)
        assert monitor.read().expected == 0
        time.sleep(0.02 if number == 1 else 0.001)
        pulse.end(2)
    pulse.begin(Activity.CALL, "train", 1)
    assert 0.02e9 <= monitor.read().expected < 0.2e9
    pulse.begin(Activity.CALL, "evaluate", 1)
    assert monitor.read().expected == 0


@pytest.mark.parametrize("value", [b"", b"loss", bytes(256)])
def test_the_replacement_of_a_worker_finds_what_followed_a_record_of_the_slot(
    path: str, value: bytes
) -> None:
    pulse = Pulse(path)
    assert pulse.kept(7) is None and not pulse.advanced(7)
    assert pulse.keep(7, value)
    assert Pulse(path).kept(7) == value and not Pulse(path).advanced(7)
    pulse.advance(7)
    assert Pulse(path).kept(7) == value and Pulse(path).advanced(7)
    assert Pulse(path).kept(8) is None and not Pulse(path).advanced(8)


def test_a_value_that_is_too_large_is_not_kept_and_one_that_nobody_keeps_need_not_be(path: str) -> None:
    pulse = Pulse(path)
    assert not pulse.keep(7, bytes(257))
    assert pulse.keep(7, None)
    assert pulse.kept(7) is None


def test_a_call_that_did_not_go_as_usual_teaches_nothing(path: str) -> None:
    pulse, monitor = Pulse(path), Monitor(path)
    for _ in range(ENOUGH + 2):
        call(pulse, learn=False)
    pulse.begin(Activity.CALL, "train", 1)
    assert monitor.read().expected == 0


def test_a_replacement_knows_what_was_learned_and_may_take_longer_the_first_time(path: str) -> None:
    first = Pulse(path)
    for _ in range(ENOUGH + 1):
        call(first, 0.001)
    first.begin(Activity.CALL, "train", 1)
    known = Monitor(path).read().expected
    second = Pulse(path)
    assert Monitor(path).read().activity is Activity.SETUP
    second.begin(Activity.CALL, "train", 1)
    assert Monitor(path).read().expected == 10 * known
    second.end(2)
    second.begin(Activity.CALL, "train", 1)
    assert Monitor(path).read().expected == known


def test_collectives_are_counted_by_group_within_a_stretch(path: str) -> None:
    pulse, monitor = Pulse(path), Monitor(path)
    pulse.begin(Activity.CALL, "train", 1)
    pulse.counts[pulse.place("a")] += 2
    pulse.counts[pulse.place("b")] += 1
    assert sorted(monitor.read().issued.values()) == [1, 2]
    pulse.turn(Activity.GATE)
    assert sorted(monitor.read().issued.values()) == [1, 2]
    pulse.end(2)
    assert sorted(monitor.read().issued.values()) == [0, 0]


def test_more_groups_than_there_is_room_for_share_a_count_that_nobody_compares(path: str) -> None:
    pulse, monitor = Pulse(path), Monitor(path)
    for number in range(100):
        pulse.counts[pulse.place(f"group {number}")] += 1
    issued = monitor.read().issued
    assert len(issued) == 63
    assert set(issued.values()) == {1}


def test_the_own_part_of_a_step_ends_with_its_first_collective(path: str) -> None:
    pulse, monitor = Pulse(path), Monitor(path)
    pulse.begin(Activity.DATA, "items", 0)
    time.sleep(0.01)
    pulse.end(0)
    pulse.begin(Activity.CALL, "train", 1)
    time.sleep(0.01)
    pulse.first()
    time.sleep(0.03)
    pulse.end(2)
    own, step = monitor.pace()
    assert 0.02 <= own
    assert own + 0.03 <= step
