"""What a group is, whatever native group is inside it, and what a rebuild says about all of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from checkpointless_elastic.errors import CheckpointlessError

__all__ = ["GroupSignature", "GroupSpec", "RebuildReport", "Superseded"]


class Superseded(CheckpointlessError):
    """Raised by a rebuild when another loss was announced meanwhile: give it up and follow the newer freeze."""


@dataclass(frozen=True)
class GroupSignature:
    """What must be equal in a replacement and the survivors.

    Attributes:
        name: the name torch gave the group.
        ranks: its members as global ranks, in order of their rank in the group.
        backend: "gloo", "nccl" or pairs such as "cpu:gloo,cuda:nccl".
    """

    name: str
    ranks: tuple[int, ...]
    backend: str


@dataclass(frozen=True)
class RebuildReport:
    """What a rebuild made of the groups, by name, and how long it took.

    Attributes:
        rebuilt: groups with a new native group inside.
        kept: groups that were not affected.
        lazy: groups that have no connections until their next use, left so now or by an earlier rebuild.
        seconds: from the call to the last connection.
    """

    rebuilt: tuple[str, ...]
    kept: tuple[str, ...]
    lazy: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class GroupSpec:
    """All that is needed to build a native group again.

    Attributes:
        name: the name torch gave the group.
        description: what `group_desc` answers.
        ranks: members as global ranks, in order of their rank in the group.
        rank: this process in the group.
        backend: as the user named it, for `get_backend`.
        devices: pairs of device type and native backend, in the order of torch's map.
        timeout: for collectives.
        options: native options of the user, or None.
        device: the accelerator the group is bound to, or None.
    """

    name: str
    description: str
    ranks: tuple[int, ...]
    rank: int
    backend: str
    devices: tuple[tuple[str, str], ...]
    timeout: timedelta
    options: Any = None
    device: torch.device | None = None

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    @property
    def backends(self) -> tuple[str, ...]:
        """The native backends, each once."""
        return tuple(dict.fromkeys(backend for _, backend in self.devices))

    @property
    def signature(self) -> GroupSignature:
        """What a replacement compares with the survivors."""
        return GroupSignature(self.name, self.ranks, self.backend)
