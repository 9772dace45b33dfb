"""The details of torch's DataLoader that skipping relies on are as they were read in torch 2.6 to 2.13."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from checkpointless_elastic.data import skipping
from checkpointless_elastic.worker import rng

ADVICE = (
    f"torch {torch.__version__} differs from what data/skipping.py was written for: read its DataLoader again"
)


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index


class Watched(RandomSampler):
    """Counts how often an iterator is asked for."""

    asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return super().__iter__()


def test_a_loader_keeps_its_samplers_in_its_instance_dictionary() -> None:
    loader = DataLoader(Numbers(), batch_size=2)
    assert isinstance(vars(loader).get("batch_sampler"), BatchSampler), ADVICE
    assert "sampler" in vars(loader), ADVICE
    assert skipping.can_skip(loader), ADVICE
    with pytest.raises(ValueError, match="should not be set"):
        loader.sampler = None  # type: ignore[assignment]


def test_a_loader_takes_its_indices_from_the_attribute_at_each_pass() -> None:
    loader = DataLoader(Numbers(), batch_size=2)
    vars(loader)["batch_sampler"] = [[5], [7]]
    assert [batch.tolist() for batch in loader] == [[5], [7]], ADVICE


def test_persistent_workers_are_in_iterator_and_use_its_own_index_sampler() -> None:
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, persistent_workers=True)
    assert not skipping.has_live_workers(loader)
    list(loader)
    assert skipping.has_live_workers(loader), ADVICE
    assert loader._iterator._index_sampler is loader.batch_sampler, ADVICE  # type: ignore[union-attr]
    before = torch.get_rng_state()
    loader._iterator._index_sampler = [[3]]  # type: ignore[union-attr]
    assert [batch.tolist() for batch in loader] == [[3]], ADVICE
    assert torch.equal(torch.get_rng_state(), before), ADVICE


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 6, 7])
def test_an_iterator_starts_at_a_batch_and_draws_as_if_it_had_come_there(workers: int, position: int) -> None:
    loader = DataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=workers)
    torch.manual_seed(4)
    plain = iter(loader)
    for _ in range(position):
        next(plain)
    rest, drawn = [batch.tolist() for batch in plain], rng.capture()
    torch.manual_seed(4)
    assert [batch.tolist() for batch in skipping.iterate_from(loader, position)] == rest
    assert rng.capture() == drawn or position == 0 or rest == [], "what loading draws is not drawn again"
    assert type(loader.batch_sampler) is BatchSampler


def test_a_sampler_is_asked_for_iterators_as_often_as_without_a_skip() -> None:
    sampler = Watched(Numbers())
    list(DataLoader(Numbers(), batch_size=3, sampler=sampler))
    asked, sampler.asked = sampler.asked, 0
    list(skipping.iterate_from(DataLoader(Numbers(), batch_size=3, sampler=sampler), 4))
    assert sampler.asked == asked


def test_persistent_workers_go_on_whole_after_a_skipped_pass() -> None:
    loader = DataLoader(Numbers(), batch_size=5, num_workers=2, persistent_workers=True)
    skipping.start_workers(loader)
    assert [batch[0].item() for batch in skipping.iterate_from(loader, 2)] == [10, 15]
    assert [batch[0].item() for batch in loader] == [0, 5, 10, 15]
