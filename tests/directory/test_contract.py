"""What an agent may rely on, whichever store stands behind the directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from checkpointless_elastic import CheckpointlessError
from checkpointless_elastic.agent.directory import Directory, Leader
from checkpointless_elastic.errors import DirectoryError

Opener = Callable[[], Directory]


def leader(term: int, agent: str = "a") -> Leader:
    return Leader(term, agent, f"{agent}.example:29400")


def test_a_new_job_has_no_coordinator_and_no_verdict(open_one: Opener) -> None:
    directory = open_one()
    assert directory.newest() is None
    assert directory.verdict() == ""
    assert directory.last_beat(1) == -1


def test_of_sixteen_agents_that_claim_the_first_term_one_wins(open_one: Opener) -> None:
    directories = [open_one() for _ in range(16)]
    start = threading.Barrier(16)

    def claim(number: int) -> bool:
        start.wait(30)
        return directories[number].claim(leader(1, f"agent{number}"))

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(claim, range(16)))
    assert won.count(True) == 1
    assert {directory.newest() for directory in directories} == {leader(1, f"agent{won.index(True)}")}


def test_a_claim_needs_the_term_before_it_to_be_the_newest(open_one: Opener) -> None:
    one, other = open_one(), open_one()
    assert not one.claim(leader(2))
    assert one.claim(leader(1))
    assert not other.claim(leader(1, "b"))
    assert not other.claim(leader(3, "b"))
    assert other.claim(leader(2, "b"))
    assert not one.claim(leader(1))
    assert one.newest() == other.newest() == leader(2, "b")


def test_a_claim_that_is_repeated_by_its_winner_still_holds(open_one: Opener) -> None:
    directory = open_one()
    assert directory.claim(leader(1))
    assert directory.claim(leader(1))


def test_terms_begin_at_one(open_one: Opener) -> None:
    with pytest.raises(ValueError, match="begin at 1"):
        open_one().claim(leader(0))


def test_beats_are_read_by_others_until_a_newer_term_fences_the_coordinator(open_one: Opener) -> None:
    one, other = open_one(), open_one()
    assert one.claim(leader(1))
    assert one.beat(1, 7)
    assert one.beat(1, 8)
    assert other.last_beat(1) == 8
    assert other.claim(leader(2, "b"))
    assert not one.beat(1, 9)
    assert other.last_beat(2) == -1
    assert other.beat(2, 1)
    assert one.last_beat(2) == 1


def test_a_waiting_agent_wakes_within_a_second_of_a_claim(open_one: Opener) -> None:
    one, other = open_one(), open_one()
    assert one.claim(leader(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: (other.wait_newer(1, 20), time.monotonic()))
        assert not wait([waiting], 0.3).done  # it waits
        claimed = time.monotonic()
        assert one.claim(leader(2, "b"))
        found, woke = waiting.result(20)
    assert found == leader(2, "b")
    assert woke - claimed < 1.0


def test_a_wait_for_a_term_that_exists_returns_at_once_and_else_ends_in_time(open_one: Opener) -> None:
    directory = open_one()
    assert directory.wait_newer(0, 0.0) is None
    assert directory.claim(leader(1))
    assert directory.wait_newer(0, 0.0) == leader(1)
    begun = time.monotonic()
    assert directory.wait_newer(1, 0.3) is None
    assert 0.3 <= time.monotonic() - begun < 1.5


def test_the_first_verdict_stays(open_one: Opener) -> None:
    one, other = open_one(), open_one()
    one.end("failed: rank 3 was lost; no é left")
    other.end("succeeded")
    assert one.verdict() == other.verdict() == "failed: rank 3 was lost; no é left"


def test_a_closed_directory_says_so(open_one: Opener) -> None:
    directory = open_one()
    directory.close()
    directory.close()
    with pytest.raises(DirectoryError, match="is closed") as caught:
        directory.newest()
    assert isinstance(caught.value, CheckpointlessError)


def test_closing_ends_a_wait(open_one: Opener) -> None:
    directory = open_one()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(directory.wait_newer, 0, 60)
        assert not wait([waiting], 0.2).done
        directory.close()
        with pytest.raises(DirectoryError, match="is closed"):
            waiting.result(20)
