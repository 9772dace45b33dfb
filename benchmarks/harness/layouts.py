"""Which ranks hold the same part of a model, by layout: the arithmetic of the meshes in jobs/layouts.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

LAYOUTS = ("ddp", "zero", "fsdp", "hsdp", "tp", "hsdp_tp", "pp")
ALONE = ("zero", "fsdp")  # each rank has a part that no other has
Holders = tuple[frozenset[int], ...]

_PARTS: dict[str, Callable[[int, int], int]] = {
    "ddp": lambda rank, ranks: 0,
    "zero": lambda rank, ranks: rank,
    "fsdp": lambda rank, ranks: rank,
    "hsdp": lambda rank, ranks: rank % (ranks // 2),
    "tp": lambda rank, ranks: rank % 2,
    "hsdp_tp": lambda rank, ranks: rank % (ranks // 2),
    "pp": lambda rank, ranks: rank // (ranks // 2),
}
_MULTIPLE = {"ddp": 1, "zero": 1, "fsdp": 1, "hsdp": 2, "tp": 2, "hsdp_tp": 4, "pp": 2}


def holders(layout: str, ranks: int) -> Holders:
    """Sets of ranks; those of one set hold the same. ValueError for a number of ranks that the layout does not take."""
    if ranks % _MULTIPLE[layout] or ranks < 2:
        raise ValueError(f"{layout} takes a multiple of {_MULTIPLE[layout]} ranks, at least 2, not {ranks}.")
    found: dict[int, set[int]] = {}
    for rank in range(ranks):
        found.setdefault(_PARTS[layout](rank, ranks), set()).add(rank)
    return tuple(frozenset(ranks) for ranks in found.values())


def survivable(lost: Iterable[int], holders: Holders) -> bool:
    """Whether each set keeps a rank when these are lost."""
    gone = set(lost)
    return all(ranks - gone for ranks in holders)
