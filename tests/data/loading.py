"""Datasets, samplers and loaders that the tests of loops go over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler


class Numbers(Dataset[torch.Tensor]):
    """Items without a random transform, as loader processes must not draw."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Drawing(Numbers):
    """Items with a transform that draws from all three generators."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), random.random(), np.random.rand(), float(torch.randn(1))])


class Stream(IterableDataset[torch.Tensor]):
    """Items of an iterable dataset, split over loader processes."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        for number in range(0 if info is None else info.id, 11, 1 if info is None else info.num_workers):
            yield torch.tensor([float(number)]) + (torch.rand(1) if info is not None else 0)


class Counter(IterableDataset[torch.Tensor]):
    """An iterable dataset that can say where it is."""

    def __init__(self) -> None:
        self._next = 0
        self._loaded = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        self._next, self._loaded = (self._next if self._loaded else 0), False
        while self._next < 11:
            self._next += 1
            yield torch.tensor([float(self._next)]) + torch.rand(1)

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next, self._loaded = state["next"], True


class Growing(list[list[int]]):
    """A batch sampler that keeps nothing but its list."""


class Counting(Sampler[int]):
    """A sampler that counts its passes, each of which has another order."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from torch.randperm(13, generator=own(self.passes)).tolist()

    def __len__(self) -> int:
        return 13


class Looking(DataLoader[torch.Tensor]):
    """A loader that is one batch ahead."""

    def __iter__(self) -> Any:
        ahead: torch.Tensor | None = None
        for batch in super().__iter__():
            if ahead is not None:
                yield ahead
            ahead = batch
        yield ahead


class Telling:
    """Wraps a loader and tells its sampler which pass it is, as Lightning's Fabric does."""

    __module__ = "lightning.fabric.wrappers"

    def __init__(self, inner: DataLoader[torch.Tensor]) -> None:
        self._dataloader = inner
        self._num_iter_calls = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self._dataloader.sampler.set_epoch(self._num_iter_calls)  # type: ignore[attr-defined]
        self._num_iter_calls += 1
        yield from self._dataloader


class Slotted:
    """Wraps a loader, and can neither be referred to weakly nor be looked into."""

    __slots__ = ("inner",)

    def __init__(self, inner: DataLoader[torch.Tensor]) -> None:
        self.inner = inner

    @property
    def sampler(self) -> Any:
        return self.inner.sampler

    @property
    def batch_sampler(self) -> Any:
        raise RuntimeError("it has none")

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.inner)


def accelerated(**options: Any) -> Any:
    """A loader of Accelerate, which counts its passes, as does its sampler."""
    PartialState(cpu=True)
    made = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=own(9), **options)
    return prepare_data_loader(made, num_processes=1, process_index=0, use_seedable_sampler=True)


def doubled(batch: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(batch) * 2


def seeded_worker(number: int) -> None:
    torch.manual_seed(number)


def own(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributed(**options: Any) -> DataLoader[torch.Tensor]:
    data = Drawing()
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=2, rank=1), **options)


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
