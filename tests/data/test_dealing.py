"""What is left of a pass is dealt to another number of ranks: nothing twice, nothing left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from checkpointless_elastic.data import dealing
from checkpointless_elastic.errors import ScriptMismatchError


def loader(
    samples: int, world: int, rank: int, batch: int = 4, epoch: int = 1, drop: bool = False, **more: Any
) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(samples))
    sampler: Any = DistributedSampler(data, world, rank, drop_last=drop)
    sampler.set_epoch(epoch)
    return DataLoader(data, batch_size=batch, sampler=sampler, drop_last=drop, **more)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("samples", [1, 7, 64, 101])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_without_a_change_the_batches_are_those_of_the_loader(samples: int, world: int, drop: bool) -> None:
    for rank in range(world):
        one = loader(samples, world, rank, drop=drop)
        assert dealing.batches(one, []) == [batch[0].tolist() for batch in one]


@pytest.mark.parametrize(("samples", "changes"), [(120, [(3, 5), (2, 9)]), (240, [(6, 2), (4, 3), (5, 7)])])
def test_over_several_changes_each_sample_comes_once(samples: int, changes: list[tuple[int, int]]) -> None:
    """All ranks of each number, for the iterations in which there were so many."""
    seen: list[int] = []
    spans = [(world, until) for world, until in changes] + [(4, -1)]
    begun = 0
    for number, (world, until) in enumerate(spans):
        for rank in range(world):
            deals = [(before, min(rank, before - 1), at) for before, at in changes[:number]]
            batches = dealing.batches(loader(samples, world, rank), deals)
            seen += [index for batch in batches[begun : until if until >= 0 else None] for index in batch]
        begun = until
    assert sorted(seen) == list(range(samples))


def test_what_the_sampler_repeats_is_of_what_is_left() -> None:
    order = dealing.batches(loader(25, 1, 0, batch=25), [])[0]
    left = [
        index
        for rank in range(3)
        for batch in dealing.batches(loader(25, 3, rank), [(2, 0, 2)])[2:]
        for index in batch
    ]
    assert sorted(left) == sorted([*order[16:], *order[16:16]]) and len(left) == 9
    left = [
        index
        for rank in range(2)
        for batch in dealing.batches(loader(25, 2, rank), [(2, 0, 2)])[2:]
        for index in batch
    ]
    assert sorted(left) == sorted([*order[16:], order[16]])


def test_a_pass_that_was_over_stays_as_it_was() -> None:
    ended = dealing.batches(loader(40, 2, 1), [(3, 2, -1)])
    assert ended == [batch[0].tolist() for batch in loader(40, 3, 2)]


def test_other_samplers_are_not_dealt_anew() -> None:
    class Own(DistributedSampler[Any]):
        def __iter__(self) -> Any:
            return iter(range(self.rank, 10, self.num_replicas))

    data = TensorDataset(torch.arange(10))
    assert dealing.dealt(DataLoader(data, batch_size=2)) is None
    assert dealing.dealt(DataLoader(data, batch_size=2, sampler=RandomSampler(data))) is None
    assert dealing.dealt(DataLoader(data, batch_size=2, sampler=Own(data, 2, 0))) is None
    assert dealing.dealt(DataLoader(data, batch_size=None, sampler=DistributedSampler(data, 2, 0))) is None
    with pytest.raises(ScriptMismatchError, match="has none now"):
        dealing.batches(DataLoader(data, batch_size=2), [(2, 0, 1)])
