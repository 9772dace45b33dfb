"""An iterator of a loader that outlives an iteration is said, and no other one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from loading import Numbers, Telling, distributed
from memory_session import Session
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from checkpointless_elastic.data import carried


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(DataLoader, "__iter__", DataLoader.__iter__)
    monkeypatch.setattr(carried, "_said", False)
    carried.watch()
    yield
    carried.forget()


def plain() -> DataLoader[torch.Tensor]:
    return DataLoader(Numbers(), batch_size=4)


def made_before_the_loop(session: Session) -> None:
    batches = iter(plain())
    for _ in session.steps(3):
        session.call(next(batches))


def made_anew_at_its_end(session: Session) -> None:
    batches: Iterator[Any] = iter(())
    for _ in session.steps(6):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(plain())
            batch = next(batches)
        session.call(batch)


def through_a_generator(session: Session) -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from plain()

    batches = endless()
    for _ in session.steps(3):
        session.call(next(batches))


def beside_a_loop(session: Session) -> None:
    for _ in session.epochs(1):
        others = iter(plain())
        for batch in session.batches(plain()):
            session.call(batch, next(others))


@pytest.mark.parametrize(
    "script", [made_before_the_loop, made_anew_at_its_end, through_a_generator, beside_a_loop]
)
def test_an_iterator_that_is_carried_on_is_said_once(
    script: Callable[[Session], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        script(Session())
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "lives longer than an iteration of run." in caplog.text


def with_an_evaluation(session: Session) -> None:
    validation = plain()
    for _ in session.epochs(2):
        waiting = iter(plain())
        for batch in session.batches(plain()):
            session.call(batch, [*validation], next(iter(validation)))
        session.call(next(waiting))


def over(make: Callable[[], Iterable[Any]]) -> Callable[[Session], None]:
    def script(session: Session) -> None:
        for _ in session.epochs(2):
            for batch in session.batches(make()):
                session.call(batch)

    return script


def persistent() -> DataLoader[torch.Tensor]:
    return DataLoader(Numbers(), batch_size=4, num_workers=1, persistent_workers=True)


def both_ways(session: Session) -> None:
    loader = persistent()
    for _ in session.epochs(2):
        for batch in session.batches(loader):
            session.call(batch)
        session.call([*loader])


QUIET = {
    "evaluation": with_an_evaluation,
    "plain": over(plain),
    "zip": over(lambda: zip(plain(), plain(), strict=True)),
    "part": over(lambda: itertools.islice(iter(plain()), 3)),
    "wrapper": over(lambda: Telling(distributed())),
    "persistent": over(persistent),
    "both ways": both_ways,
    "stateful": over(lambda: StatefulDataLoader(Numbers(), batch_size=4)),
}


@pytest.mark.parametrize("name", QUIET)
def test_other_iterators_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="checkpointless_elastic"):
        QUIET[name](Session())
    assert caplog.text == ""
