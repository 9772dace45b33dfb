"""What each collective of a process group writes and reads, by the names torch gives it.

Read in torch 2.13: `torch/csrc/distributed/c10d/ProcessGroup.hpp` and `distributed_c10d.py`. Methods renamed in 2.13
stand beside their older names and share one `Op`. All extraction is done only where a collective is void, logged or
repeated, so that the usual call does not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["OPS", "Call", "Op", "Source", "flat"]

Source = torch.Tensor | None
"""What fills an output locally: a tensor of as many elements, or None for zeros."""


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors in an argument that is a tensor or a list of lists of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in flat(item)]


@dataclass(frozen=True)
class Call:
    """The arguments of one collective and the place from which it was issued.

    Attributes:
        values: the arguments by position, keyword arguments included.
        rank: this process in the group.
        size: number of members.
    """

    values: Sequence[Any]
    rank: int
    size: int

    def tensors(self, position: int) -> list[torch.Tensor]:
        """The tensors of one argument; empty if it was not given."""
        return flat(self.values[position]) if position < len(self.values) else []

    def all_tensors(self) -> list[torch.Tensor]:
        """The tensors of all arguments."""
        return flat(list(self.values))

    def root(self, position: int) -> int:
        """The root rank: a field of the options or, in the short forms, the number at this position."""
        for value in self.values[position:]:
            if isinstance(value, int):
                return value
            if hasattr(value, "rootRank"):
                return int(value.rootRank)
        return 0

    def is_root(self, position: int) -> bool:
        """True if this rank is the root."""
        return self.root(position) == self.rank


Writes = Callable[[Call], list[torch.Tensor]]
Fills = Callable[[Call], Iterator[tuple[torch.Tensor, Source]]]


@dataclass(frozen=True)
class Op:
    """One collective.

    Attributes:
        name: its name in logs and messages.
        methods: the names under which a process group offers it.
        writes: tensors that the native collective writes on this rank.
        fills: pairs of an output and what fills it locally; outputs that keep their value are left out.
        keywords: names of the arguments by position, where callers pass them by name.
        in_place: the outputs are inputs too.
        point_to_point: it needs one peer that may not issue it again.
    """

    name: str
    methods: tuple[str, ...]
    writes: Writes
    fills: Fills
    keywords: tuple[str, ...] = ()
    in_place: bool = False
    point_to_point: bool = False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int, size: int) -> Call:
        """The arguments by position, for extraction."""
        named = [kwargs[key] for key in self.keywords if key in kwargs]
        rest = [value for key, value in kwargs.items() if key not in self.keywords]
        return Call((*args, *named, *rest), rank, size)


def _nothing(call: Call) -> list[torch.Tensor]:
    return []


def _no_fill(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    return iter(())


def _first(call: Call) -> list[torch.Tensor]:
    return call.tensors(0)


def _unless_root(call: Call) -> list[torch.Tensor]:
    return [] if call.is_root(1) else call.tensors(0)


def _on_root(position: int) -> Writes:
    return lambda call: call.tensors(0) if call.is_root(position) else []


def _zeros(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    return ((tensor, None) for tensor in call.tensors(0))


def _gathered(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    """Every slot gets the own input. With several inputs (one per device) each has its own list of slots."""
    inputs = call.tensors(1)
    for index, slot in enumerate(call.tensors(0)):
        yield slot, inputs[min(index // call.size, len(inputs) - 1)]


def _gathered_coalesced(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    """Lists by rank, each with one slot per input."""
    inputs = call.tensors(1)
    for index, slot in enumerate(call.tensors(0)):
        yield slot, inputs[index % len(inputs)]


def _gathered_single(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    """Every chunk of the single output gets the own input."""
    for output, own in zip(call.tensors(0), call.tensors(1), strict=False):
        for chunk in output.view(-1).chunk(call.size):
            yield chunk, own


def _scattered(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    inputs = call.tensors(1)
    for output in call.tensors(0):
        yield output, inputs[call.rank] if call.rank < len(inputs) else None


def _scattered_single(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    """The single output gets its chunk of the single input."""
    for output, own in zip(call.tensors(0), call.tensors(1), strict=False):
        chunks = own.reshape(-1).chunk(call.size)
        yield output, chunks[call.rank] if call.rank < len(chunks) else None


def _exchanged(call: Call) -> Iterator[tuple[torch.Tensor, Source]]:
    yield from zip(call.tensors(0), call.tensors(1), strict=False)


ALL_OPS: tuple[Op, ...] = (
    Op("broadcast", ("broadcast",), _unless_root, _no_fill, in_place=True),
    Op("all_reduce", ("allreduce",), _first, _no_fill, in_place=True),
    Op("all_reduce_coalesced", ("allreduce_coalesced",), _first, _no_fill, in_place=True),
    Op("reduce", ("reduce",), _on_root(1), _no_fill, in_place=True),
    Op("all_gather", ("allgather",), _first, _gathered),
    Op("all_gather_coalesced", ("allgather_coalesced",), _first, _gathered_coalesced),
    Op("all_gather_single", ("all_gather_single", "_allgather_base"), _first, _gathered_single),
    Op(
        "all_gather_single_coalesced",
        ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
        _first,
        _gathered_single,
    ),
    Op("gather", ("gather",), _first, _gathered),
    Op("scatter", ("scatter",), _first, _scattered),
    Op("reduce_scatter", ("reduce_scatter",), _first, _scattered),
    Op("reduce_scatter_single", ("reduce_scatter_single", "_reduce_scatter_base"), _first, _scattered_single),
    Op(
        "reduce_scatter_single_coalesced",
        ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
        _first,
        _scattered_single,
    ),
    Op("all_to_all_single", ("all_to_all_single", "alltoall_base"), _first, _exchanged),
    Op("all_to_all", ("alltoall",), _first, _exchanged),
    Op("send", ("send",), _nothing, _no_fill, point_to_point=True),
    Op("recv", ("recv",), _first, _zeros, point_to_point=True),
    Op("recv_anysource", ("recv_anysource",), _first, _zeros, point_to_point=True),
    Op("barrier", ("barrier",), _nothing, _no_fill),
    Op("monitored_barrier", ("monitored_barrier",), _nothing, _no_fill),
)

OPS: dict[str, Op] = {method: op for op in ALL_OPS for method in op.methods}
"""Every collective by the name of the method that issues it."""
