"""The event loop."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from checkpointless_elastic.agent.runtime import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe() for _ in range(3)]
    yield made
    for ends in made:
        for fd in ends:
            os.close(fd)


def test_timers_fire_once_in_the_order_of_their_time(loop: EventLoop) -> None:
    fired: list[str] = []
    loop.call_later(0.02, lambda: fired.append("late"))
    loop.call_later(0.0, lambda: fired.append("early"))
    assert loop.run(lambda: len(fired) == 2, 5.0)
    assert not loop.run(lambda: len(fired) > 2, 0.05)
    assert fired == ["early", "late"]


def test_a_cancelled_timer_does_not_fire(loop: EventLoop) -> None:
    fired: list[str] = []
    timer = loop.call_later(0.0, lambda: fired.append("no"))
    loop.call_later(0.01, lambda: fired.append("yes"))
    timer.cancel()
    assert loop.run(lambda: bool(fired), 5.0)
    assert fired == ["yes"]


def test_a_timer_may_set_another_one(loop: EventLoop) -> None:
    fired: list[int] = []
    loop.call_later(0.0, lambda: loop.call_later(0.0, lambda: fired.append(1)) and None)
    assert loop.run(lambda: bool(fired), 5.0)


def test_run_gives_up_after_its_timeout(loop: EventLoop) -> None:
    assert not loop.run(lambda: False, 0.01)


def test_a_descriptor_is_served_while_it_is_watched(loop: EventLoop, pipes: list[tuple[int, int]]) -> None:
    got: list[bytes] = []
    read, write = pipes[0]
    loop.watch(read, lambda: got.append(os.read(read, 1)))
    os.write(write, b"ab")
    assert loop.run(lambda: got == [b"a", b"b"], 5.0)
    loop.unwatch(read)
    loop.unwatch(read)
    os.write(write, b"c")
    assert not loop.run(lambda: len(got) > 2, 0.02)


def test_descriptors_marked_first_are_served_first(loop: EventLoop, pipes: list[tuple[int, int]]) -> None:
    order: list[int] = []
    for index, (read, write) in enumerate(pipes):

        def take(index: int = index, read: int = read) -> None:
            os.read(read, 1)
            order.append(index)

        loop.watch(read, take, first=index == 2)
        os.write(write, b"x")
    assert loop.run(lambda: len(order) == 3, 5.0)
    assert order[0] == 2


def test_a_descriptor_taken_away_in_the_same_round_is_not_served(
    loop: EventLoop, pipes: list[tuple[int, int]]
) -> None:
    served: list[int] = []
    reads = [read for read, _ in pipes[:2]]

    def serve(index: int) -> None:
        served.append(index)
        loop.unwatch(reads[0])
        loop.unwatch(reads[1])

    for index in range(2):
        loop.watch(reads[index], lambda index=index: serve(index))  # type: ignore[misc]
        os.write(pipes[index][1], b"x")
    assert loop.run(lambda: bool(served), 5.0)
    assert not loop.run(lambda: len(served) > 1, 0.02)


def test_write_interest_can_be_added_and_removed(loop: EventLoop, pipes: list[tuple[int, int]]) -> None:
    _, write = pipes[0]
    ready: list[int] = []
    loop.watch(write, lambda: None, lambda: ready.append(1))
    assert loop.run(lambda: bool(ready), 5.0)
    loop.watch(write, lambda: None)
    ready.clear()
    assert not loop.run(lambda: bool(ready), 0.02)


def test_an_error_in_a_callback_is_not_swallowed(loop: EventLoop) -> None:
    loop.call_later(0.0, lambda: [][0])  # type: ignore[misc]
    with pytest.raises(IndexError):
        loop.run(lambda: False, 5.0)
