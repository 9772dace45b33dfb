"""The end of all groups while the process lives on: torch.distributed is then as in a fresh process.

Read in torch 2.13: `destroy_process_group` in `torch/distributed/distributed_c10d.py`. It shuts each group down,
which may wait for peers, and does nothing where the script was left while it made or destroyed its first group; so what
it does to torch's tables is done here.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import _unregister_all_process_groups
from torch.distributed import distributed_c10d as c10d

from checkpointless_elastic.groups import ddp, patch
from checkpointless_elastic.groups.elastic import ElasticProcessGroup
from checkpointless_elastic.groups.link import retire
from checkpointless_elastic.groups.waiting import end_idle

if TYPE_CHECKING:
    from checkpointless_elastic.groups.registry import Registry

__all__ = ["leave"]

_TABLES = (
    "comms",
    "pg_map",
    "pg_names",
    "pg_group_ranks",
    "pg_backend_config",
    "pg_to_tag",
    "tags_to_pg",
    "pg_coalesce_state",
)


def leave(registry: Registry) -> list[weakref.ref[ElasticProcessGroup]]:
    """After `Registry.abandon`, on the main thread: torch forgets its groups, without a word to peers.

    What is left of the groups when all that held them is gone: nothing, or somebody still holds one.
    """
    patch.uninstall()
    ddp.uninstall()
    groups = [*registry.engine.groups.values()]
    world: Any = c10d._world
    for name in _TABLES:
        getattr(world, name, {}).clear()
    patch.set_group_count(0)
    c10d._update_default_pg(None)
    _unregister_all_process_groups()
    registry.engine.groups.clear()
    retire([group.link for group in groups if group.link.native is not None])
    end_idle()
    return [weakref.ref(group) for group in groups]
