"""Votes in memory, cast by real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest

from checkpointless_elastic.worker import ballot as module
from checkpointless_elastic.worker.ballot import LOOK_S, Ballot

RANKS = 4
LIMIT_S = 60.0
FORK = multiprocessing.get_context("fork")


def never() -> bool:
    return False


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ballot")


@pytest.fixture
def agent(path: str) -> Ballot:
    return Ballot.create(path, RANKS)


@pytest.fixture
def ranks(agent: Ballot, path: str) -> list[Ballot]:
    return [Ballot.open(path, number) for number in range(RANKS)]


@pytest.fixture
def started() -> Iterator[list[multiprocessing.process.BaseProcess]]:
    processes: list[multiprocessing.process.BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def test_a_vote_counts_while_the_ballot_is_open_and_below_its_limit(
    agent: Ballot, ranks: list[Ballot]
) -> None:
    assert [rank.cast(0) for rank in ranks] == [False] * RANKS
    assert agent.committed() == 0
    agent.begin(3)
    assert [rank.cast(1) for rank in ranks[:-1]] == [True] * (RANKS - 1)
    assert agent.committed() == 0
    assert ranks[-1].cast(1)
    assert agent.committed() == 2
    assert [rank.cast(2) for rank in ranks] == [True] * RANKS
    assert agent.committed() == 3
    assert [rank.cast(3) for rank in ranks] == [False] * RANKS
    assert agent.committed() == 3, "that step is not decided here"


def test_a_vote_of_an_earlier_generation_does_not_count(agent: Ballot, ranks: list[Ballot]) -> None:
    agent.begin(100)
    for rank in ranks[1:]:
        rank.cast(5)  # void: one rank was lost
    agent.end()
    assert agent.committed() == 0
    assert [rank.cast(5) for rank in ranks] == [False] * RANKS  # the first step is decided by messages
    agent.begin(100)
    ranks[0].cast(6)
    assert agent.committed() == 5
    assert not ranks[0].wait(6, lambda: True)


def walk(path: str, number: int, steps: int, at: Synchronized[int], ahead: Synchronized[int]) -> None:
    """A rank that votes as fast as it can. ``at``: votes of all so far; ``ahead``: passes that came too early."""
    rank = Ballot.open(path, number)
    for step in range(1, steps):
        with at.get_lock():
            at.value += 1
        assert rank.cast(step)
        assert rank.wait(step, never)
        if at.value < step * RANKS:
            ahead.value += 1


def test_no_rank_passes_a_step_before_all_have_voted_for_it(
    agent: Ballot, path: str, started: list[multiprocessing.process.BaseProcess]
) -> None:
    steps, at, ahead = 2000, FORK.Value("q", 0), FORK.Value("q", 0)
    agent.begin(steps)
    for number in range(RANKS):
        started.append(FORK.Process(target=walk, args=(path, number, steps, at, ahead)))
        started[-1].start()
    for process in started:
        process.join(LIMIT_S)
        assert process.exitcode == 0
    assert (at.value, ahead.value) == ((steps - 1) * RANKS, 0)
    assert agent.committed() == steps


def vote_and_die(path: str, number: int, step: int) -> None:
    Ballot.open(path, number).cast(step)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_vote_of_a_rank_that_is_killed_at_once_counts_and_nobody_waits_for_its_bell(
    agent: Ballot, path: str, ranks: list[Ballot], started: list[multiprocessing.process.BaseProcess]
) -> None:
    agent.begin(100)
    for rank in ranks[1:]:
        rank.cast(7)
    started.append(FORK.Process(target=vote_and_die, args=(path, 0, 7)))
    started[0].start()
    begun = time.monotonic()
    assert ranks[1].wait(7, never)
    assert time.monotonic() - begun < LIMIT_S
    started[0].join()
    assert agent.committed() == 8


def test_a_rank_that_gives_up_is_woken_by_the_bell(
    agent: Ballot, ranks: list[Ballot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._LOOK, "seconds", int(LIMIT_S))  # it would not look again by itself
    given_up = threading.Event()
    verdict: list[bool] = []
    agent.begin(100)
    ranks[0].cast(1)
    waiter = threading.Thread(target=lambda: verdict.append(ranks[0].wait(1, given_up.is_set)), daemon=True)
    waiter.start()
    waiter.join(2 * LOOK_S)
    assert waiter.is_alive()
    given_up.set()
    ranks[1].ring()
    waiter.join(LIMIT_S / 2)
    assert verdict == [False]


def test_without_a_futex_the_ballot_stays_closed(
    agent: Ballot, ranks: list[Ballot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FUTEX", 0)
    agent.begin(100)
    assert not ranks[0].cast(1)
    ranks[0].ring()
    assert agent.committed() == 0
