"""Collectives outside of steps after a loss: who repeats what.

When a member dies some of the others may have finished a collective that the rest must repeat: a barrier's last
message was lost, or a broadcast's root ran ahead. A member that repeats it needs all the others once more. So each
one keeps copies of the arguments of its small collectives outside of steps until the next committed call. When a group
is rebuilt its members tell each other how far they are, and those ahead issue what the others still need again, on
copies, before anything else.

A member's place in a group is (number of committed calls, collectives ended since then).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from checkpointless_elastic.groups.log import MAX_BYTES, Entry

if TYPE_CHECKING:
    from checkpointless_elastic.groups.issue import Region
    from checkpointless_elastic.groups.ops import Op
    from checkpointless_elastic.groups.work import ElasticWork

__all__ = ["Kept", "Ledger", "Owed", "Place", "copied", "keep"]

Place = tuple[int, int]


def copied(value: Any) -> Any:
    """The same arguments with every tensor cloned."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


@dataclass(eq=False)
class Kept:
    """What is needed to log or repeat one collective.

    Attributes:
        entry: its place in the log, None if it is not logged.
        place: its place in the group, None before the first step.
        sequence: its place among the collectives of all groups.
        again: copies of its arguments, None if they are too large or it cannot be repeated.
        inputs: pairs of a tensor that it overwrites and reads, and its value before.
        versions: pairs of an argument and its version counter, to see that the script left it alone meanwhile.
        region: what captures its outputs, None outside of a rebuild of DDP's buckets.
    """

    entry: Entry | None
    place: Place | None = None
    sequence: int = 0
    again: tuple[Any, Any] | None = None
    inputs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    versions: tuple[tuple[torch.Tensor, int], ...] = ()
    region: Region | None = None

    def unchanged(self) -> bool:
        """True if the script did not write to the arguments since the collective was issued."""
        return all(tensor._version == version for tensor, version in self.versions)

    def restore(self) -> None:
        """Puts back the inputs that the failed collective may have overwritten."""
        for tensor, value in self.inputs:
            tensor.data.copy_(value)


def keep(op: Op, args: Any, kwargs: Any, tensors: list[torch.Tensor], written: list[torch.Tensor]) -> Kept:
    """Copies what a collective outside of steps needs to be repeated. `tensors` are all its arguments' tensors."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    overwritten = tensors if op.in_place else _read_and_written(tensors, written)
    return Kept(
        None,
        again=copied((args, kwargs)) if size <= MAX_BYTES else None,
        inputs=tuple((tensor, tensor.detach().clone()) for tensor in overwritten),
        versions=tuple((tensor, tensor._version) for tensor in tensors),
    )


def _read_and_written(tensors: list[torch.Tensor], written: list[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs that lie in an output's memory."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in written}
    identities = {id(tensor) for tensor in written}
    return [t for t in tensors if id(t) not in identities and t.untyped_storage().data_ptr() in storages]


@dataclass(frozen=True)
class Owed:
    """A finished collective that other members may still need.

    Attributes:
        group: name of its group.
        method: how it is issued.
        place: its place in the group.
        sequence: its place among the collectives of all groups.
        again: copies of its arguments, None if it was too large to keep.
    """

    group: str
    method: str
    place: Place
    sequence: int
    again: tuple[Any, Any] | None


class Ledger:
    """Places and finished collectives of this rank. Used by the main thread only.

    Attributes:
        calls: number of committed calls, None until the first step is known.
        owed: what this rank must issue again before anything else, in order of issue.
        pending: collectives outside of steps that have not ended, in order of issue.
    """

    def __init__(self) -> None:
        self.calls: int | None = None
        self.owed: list[Owed] = []
        self.pending: list[ElasticWork] = []
        self._next: dict[str, int] = {}
        self._finished: list[Owed] = []
        self._sequence = 0

    def commit(self, calls: int) -> None:
        """That many replayable calls are committed: every rank has finished what came before."""
        self.calls = calls
        self._next.clear()
        self._finished.clear()

    @property
    def issued(self) -> dict[str, int]:
        """By group: collectives outside of steps issued since the last committed call."""
        return self._next

    def catch_up(self, issued: dict[str, int], exact: bool) -> None:
        """A replacement has come to where the lost rank was, which had issued so many since the last committed call.

        It need not have met all again. ``exact``: nor did that rank issue more, so of those that the replacement has
        met these are the last; what makes an iterator is met again in each iteration.
        """
        early = {
            group: max(0, met - issued.get(group, 0)) if exact else 0 for group, met in self._next.items()
        }
        for group, met in self._next.items():
            self._next[group] = met - early[group]
        for group, count in issued.items():
            self._next[group] = max(count, self._next.get(group, 0))
        finished, self._finished = self._finished, []
        for done in finished:
            calls, index = done.place
            if index >= early[done.group]:
                self._finished.append(replace(done, place=(calls, index - early[done.group])))

    def concerns(self, group: str) -> bool:
        """True if a collective of this group, since the last committed call, may have to be repeated."""
        return bool(self._next.get(group)) or any(owed.group == group for owed in self.owed)

    def number(self, group: str, kept: Kept) -> None:
        """Gives a collective that is issued now its place."""
        if self.calls is None:
            return
        index = self._next.get(group, 0)
        self._next[group] = index + 1
        self._sequence += 1
        kept.place, kept.sequence = (self.calls, index), self._sequence

    def finish(self, group: str, method: str, kept: Kept) -> None:
        """A collective outside of steps has ended here."""
        if kept.place is not None and kept.place[0] == self.calls:
            self._finished.append(Owed(group, method, kept.place, kept.sequence, kept.again))

    def place(self, group: str) -> Place | None:
        """How far this rank is in a group: the first collective that has not ended here."""
        if self.calls is None:
            return None
        open_places = [
            work.kept.place
            for work in self.pending
            if work.kept is not None and work.kept.place is not None and work.group.group_name == group
        ]
        return min(open_places, default=(self.calls, self._next.get(group, 0)))

    def compare(self, places: dict[str, list[Place]]) -> None:
        """Groups were rebuilt and their members' places are known: notes what this rank owes to those behind."""
        others = [owed for owed in self.owed if owed.group not in places]
        behind = {group: min(members) for group, members in places.items() if members}
        due = [done for done in self._finished if done.group in behind and done.place >= behind[done.group]]
        self.owed = sorted(others + due, key=lambda owed: owed.sequence)
