"""What threads have done on the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.runtime import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def test_work_aside_is_done_on_another_thread_and_its_end_is_told_on_the_loop(loop: EventLoop) -> None:
    threads: list[threading.Thread] = []
    Bell(loop).aside(
        lambda: threads.append(threading.current_thread()),
        lambda: threads.append(threading.current_thread()),
    )
    assert loop.run(lambda: len(threads) == 2, 10.0)
    assert threads[0] is not threads[1]
    assert threads[1] is threading.current_thread()


def test_what_work_aside_raises_comes_out_of_the_loop(loop: EventLoop) -> None:
    def work() -> None:
        raise OSError("no room")

    Bell(loop).aside(work, lambda: pytest.fail("it has failed"))
    with pytest.raises(OSError, match="no room"):
        loop.run(lambda: False, 10.0)
