"""What is left of a pass over the data, dealt to another number of ranks.

torch's DistributedSampler gives every W-th sample of an order that all ranks know to each of W ranks. So after p
batches of size B on each rank, the first p * B * W samples of that order have been consumed. The others are dealt to
the new ranks in the same way: sample i of them goes to rank i modulo W'. No sample comes twice in a pass, and none is
left out, but for what the sampler itself repeats or drops to make the numbers equal, of what is left.

Read in torch 2.6 to 2.13: `torch/utils/data/distributed.py`, `sampler.py`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from checkpointless_elastic.errors import ScriptMismatchError

__all__ = ["Deal", "batches", "dealt", "share"]

Deal = tuple[int, int, int]
"""Number of ranks, which of them, and the iterations of the pass up to which this was so; -1: to its end."""


def dealt(loader: DataLoader[Any]) -> tuple[int, int] | None:
    """The number of ranks to which this loader is dealt, and which of them this one is; None if it is not known how."""
    batch_sampler, sampler = loader.batch_sampler, loader.sampler
    known = (
        isinstance(batch_sampler, BatchSampler)
        and type(batch_sampler).__iter__ is BatchSampler.__iter__
        and batch_sampler.sampler is sampler
        and isinstance(sampler, DistributedSampler)
        and type(sampler).__iter__ is DistributedSampler.__iter__
    )
    return (sampler.num_replicas, sampler.rank) if known else None  # type: ignore[attr-defined]


def batches(loader: DataLoader[Any], deals: Sequence[Deal]) -> list[list[int]]:
    """The batches of one pass on this rank, as lists of indices: those of the earlier deals, then what is left.

    Raises ScriptMismatchError if the loader is not dealt as it was before.
    """
    now = dealt(loader)
    if now is None:
        raise ScriptMismatchError(
            "The loader had a DistributedSampler before the number of ranks changed, and has none now; build it in the "
            "same way in each run of the script."
        )
    sampler: Any = loader.sampler
    batch_sampler: Any = loader.batch_sampler
    size, left = batch_sampler.batch_size, _order(sampler)
    found: list[list[int]] = []
    for world, rank, until in [*deals, (*now, -1)]:
        all_of_them = _batches(share(left, world, rank, sampler.drop_last), size, batch_sampler.drop_last)
        taken = all_of_them if until < 0 else all_of_them[: until - len(found)]
        found += taken
        if until < 0:
            break
        left = left[len(taken) * size * world :]
    return found


def share(order: Sequence[int], world: int, rank: int, drop_last: bool) -> list[int]:
    """What DistributedSampler gives to one of ``world`` ranks of samples in this order."""
    if not order:
        return []
    if drop_last:
        return list(order[: len(order) // world * world][rank::world])
    total = math.ceil(len(order) / world) * world
    return list(itertools.islice(itertools.cycle(order), total))[rank::world]


def _order(sampler: Any) -> list[int]:
    """The order that all ranks know, of this epoch."""
    alone = copy.copy(sampler)
    alone.num_replicas, alone.rank = 1, 0
    alone.num_samples = alone.total_size = len(sampler.dataset)
    return list(alone)


def _batches(indices: list[int], size: int, drop_last: bool) -> list[list[int]]:
    found = [indices[at : at + size] for at in range(0, len(indices), size)]
    return found[:-1] if drop_last and found and len(found[-1]) < size else found
