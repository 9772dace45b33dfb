"""The end of all groups while the process lives on: torch.distributed is then as in a fresh process."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from checkpointless_elastic.groups import ddp, patch
from checkpointless_elastic.groups.elastic import ElasticProcessGroup
from checkpointless_elastic.groups.link import retire
from checkpointless_elastic.groups.waiting import end_idle

if TYPE_CHECKING:
    from checkpointless_elastic.groups.registry import Registry

__all__ = ["leave"]


def leave(registry: Registry) -> list[weakref.ref[ElasticProcessGroup]]:
    """After `Registry.abandon`, on the main thread: torch forgets its groups, without a word to peers.

    What is left of the groups when all that held them is gone: nothing, or somebody still holds one.
    """
    patch.uninstall()
    ddp.uninstall()
    groups = [*registry.engine.groups.values()]
    if dist.is_initialized():
        dist.destroy_process_group()  # while `ending` holds, elastic groups are not shut down by it
    c10d._world.group_count = (
        0  # names of groups; not reset where the script was left while it made the first one
    )
    registry.engine.groups.clear()
    retire([group.link for group in groups if group.link.native is not None])
    end_idle()
    return [weakref.ref(group) for group in groups]
