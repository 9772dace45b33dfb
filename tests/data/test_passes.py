"""What a loader keeps from one pass to the next comes back in a replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from loading import Counting, Drawing, Numbers, own, seed
from memory_session import Session, assert_a_loss_changes_nothing, run_to_the_end, run_with_losses
from torch.utils.data import DataLoader


class Passes:
    """Scripts of several passes that use their loaders in different ways."""

    @staticmethod
    def validation_waits(session: Session) -> None:
        """The second loop of an epoch has a generator and living workers from the epoch before."""
        seed()
        train = DataLoader(Drawing(), batch_size=5, shuffle=True)
        validation = DataLoader(Numbers(), batch_size=7, shuffle=True, generator=own(2))
        for _ in session.epochs(3):
            for batch in session.batches(train):
                session.call(batch)
            for batch in session.batches(validation):
                session.call(batch)

    @staticmethod
    def one_loader_in_two_places(session: Session) -> None:
        seed()
        loader = DataLoader(Drawing(), batch_size=5, shuffle=True, generator=own(2))
        for batch in session.batches(loader):
            session.call(batch)
        for _ in session.epochs(2):
            for batch in session.batches(loader):
                session.call(batch)
                break
        for batch in session.batches(loader):
            session.call(batch)

    @staticmethod
    def a_new_loader_each_epoch(session: Session) -> None:
        seed()
        for epoch in session.epochs(3):
            loader = DataLoader(Drawing(), batch_size=5, shuffle=True, generator=own(epoch))
            for batch in session.batches(loader):
                session.call(batch)

    @staticmethod
    def a_sampler_that_counts_and_is_made_anew(session: Session) -> None:
        seed()
        train = DataLoader(Drawing(), batch_size=5, shuffle=True)
        for _ in session.epochs(3):
            for batch in session.batches(train):
                session.call(batch)
            for batch in session.batches(DataLoader(Numbers(), batch_size=7, sampler=Counting())):
                session.call(batch)

    @staticmethod
    def a_sampler_that_counts_and_is_told(session: Session) -> None:
        seed()
        sampler = Counting()
        train = DataLoader(Drawing(), batch_size=7, sampler=sampler, generator=own(2))
        for epoch in session.epochs(4):
            sampler.passes = epoch % 2
            for batch in session.batches(train):
                session.call(batch, torch.rand(1))

    @staticmethod
    def collectives_at_both_ends_of_a_pass(session: Session) -> None:
        class Agreeing(Counting):
            def __iter__(self) -> Iterator[int]:
                shift = int(session.outside(2.0))
                yield from ((number + shift) % 13 for number in range(13))
                session.outside(3.0)

        seed()
        loader = DataLoader(Numbers(), batch_size=3, sampler=Agreeing())
        for _ in session.epochs(2):
            for batch in session.batches(loader):
                session.call(batch, session.outside(float(batch.sum())))


@pytest.mark.parametrize(
    "script",
    [
        Passes.validation_waits,
        Passes.a_sampler_that_counts_and_is_made_anew,
        Passes.a_sampler_that_counts_and_is_told,
        Passes.collectives_at_both_ends_of_a_pass,
        Passes.one_loader_in_two_places,
        Passes.a_new_loader_each_epoch,
    ],
)
def test_what_a_loader_keeps_between_passes_is_brought_back(script: Callable[[Session], None]) -> None:
    whole = run_to_the_end(script)
    for moment in range(1, whole.moments + 1):
        assert_a_loss_changes_nothing(script, [moment], whole)
        assert_a_loss_changes_nothing(script, [moment, 9], whole)


def test_a_loader_made_anew_from_the_same_seed_gives_what_it_gives_without_a_session() -> None:
    def three_passes(over: Callable[[Any], Iterable[Any]]) -> list[Any]:
        seed()
        loaders = (DataLoader(Numbers(), batch_size=5, shuffle=True, generator=own(4)) for _ in range(3))
        return [batch.flatten().tolist() for loader in loaders for batch in over(loader)]

    assert three_passes(Session().batches) == three_passes(iter)


def test_persistent_workers_that_wait_for_their_next_pass_draw_nothing_when_they_start() -> None:
    def script(session: Session) -> None:
        torch.manual_seed(1)
        validation = DataLoader(Numbers(), batch_size=7, shuffle=True, num_workers=1, persistent_workers=True)
        for _ in session.epochs(2):
            session.call(torch.rand(1))
            for batch in session.batches(validation):
                session.call(batch)

    whole = run_to_the_end(script)
    for moment in range(whole.moments // 2, whole.moments, 3):
        assert_a_loss_changes_nothing(script, [moment], whole)


def test_collectives_of_some_batches_are_told_from_those_with_which_a_pass_begins() -> None:
    def script(session: Session) -> None:
        def collate(batch: list[torch.Tensor]) -> torch.Tensor:
            first = int(batch[0])
            return torch.stack(batch) + (session.outside(first) if first % 2 == 0 else 0)

        seed()
        loader = DataLoader(Numbers(), batch_size=3, collate_fn=collate)
        for _ in session.epochs(2):
            for batch in session.batches(loader):
                session.call(batch)

    whole = run_to_the_end(script)
    for moment in range(1, whole.moments + 1):
        for moments in ([moment], [moment, 9]):
            trace, _ = run_with_losses(script, moments)
            assert trace == whole.trace, f"after a loss at moments {moments}"
