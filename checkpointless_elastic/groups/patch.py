"""torch.distributed gives elastic groups: the one place where its functions are exchanged.

Read in torch 2.13: `torch/distributed/distributed_c10d.py`. `init_process_group` and `new_group` (and through
them `init_device_mesh`) make every group with `_new_process_group_helper`, which is exchanged for one that makes
elastic groups of gloo and NCCL and leaves other backends to torch's own.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, _register_process_group
from torch.distributed import distributed_c10d as c10d

from checkpointless_elastic.errors import UnsupportedTorchError
from checkpointless_elastic.groups.elastic import ElasticProcessGroup
from checkpointless_elastic.groups.spec import GroupSpec

if TYPE_CHECKING:
    from checkpointless_elastic.groups.registry import Registry

__all__ = ["group_count", "install", "set_group_count", "uninstall"]

_ARGUMENTS = (
    "group_size",
    "group_rank",
    "global_ranks_in_group",
    "backend",
    "store",
    "group_name",
    "timeout",
)
_originals: dict[str, Any] = {}


def install(registry: Registry) -> None:
    """Exchanges the functions. Once per process, before the script runs; `uninstall` undoes it."""
    if _originals:
        uninstall()
    helper = c10d._new_process_group_helper
    missing = [name for name in _ARGUMENTS if name not in inspect.signature(helper).parameters]
    if missing:
        raise UnsupportedTorchError(
            f"torch {dist.__name__}._new_process_group_helper has no arguments {missing}: "
            "use torch 2.13, which was read."
        )
    # The watchdog and the monitor of NCCL would end the process at a lost peer.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    _exchange("_new_process_group_helper", functools.partial(_new_group, registry, helper))
    _exchange("_store_based_barrier", functools.partial(_barrier, registry, c10d._store_based_barrier))
    _exchange("broadcast_object_list", functools.partial(_objects, registry, c10d.broadcast_object_list))
    _exchange("batch_isend_irecv", functools.partial(_batch, c10d.batch_isend_irecv))
    _exchange("destroy_process_group", functools.partial(_destroy, registry, c10d.destroy_process_group))
    _hide_from_dynamo()


def uninstall() -> None:
    """Puts torch's own functions back. Groups made meanwhile stay elastic."""
    for name, function in _originals.items():
        setattr(c10d, name, function)
        if hasattr(dist, name):
            setattr(dist, name, function)
    _originals.clear()


def group_count() -> int:
    """How many groups torch has numbered in this process, those that are gone too: the next one is named by it."""
    return int(c10d._world.group_count)


def set_group_count(count: int) -> None:
    """Have the next group named by this number; see `group_count`. A replacement takes that of its peers."""
    c10d._world.group_count = count


@functools.cache
def _hide_from_dynamo() -> None:
    """torch.compile does not trace this package: DDP's C++ calls elastic groups in the middle of compiled functions.

    For its bucket rebuild, in a backward, at the gate: it fails on attributes that it does not know.
    """
    from torch._dynamo import trace_rules  # takes seconds where it is not loaded yet, as under plain python

    trace_rules.add("checkpointless_elastic")


def _exchange(name: str, function: Callable[..., Any]) -> None:
    original = getattr(c10d, name)
    functools.update_wrapper(function, original)
    _originals[name] = original
    setattr(c10d, name, function)
    if getattr(dist, name, None) is original:
        setattr(dist, name, function)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `_new_process_group_helper`, by their names in torch."""

    group_size: int
    group_rank: Any
    global_ranks_in_group: list[int]
    backend: Any
    store: Any
    group_name: Any
    timeout: Any
    backend_options: Any = None
    pg_tag: Any = None
    device_id: Any = None
    group_desc: Any = None


def _new_group(
    registry: Registry, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """`_new_process_group_helper`: a group and its store, or the mark of a non-member."""
    values = inspect.signature(original).bind(*args, **kwargs).arguments
    asked = _Asked(**{name: values[name] for name in _Asked.__dataclass_fields__ if name in values})
    config = c10d.BackendConfig(asked.backend)
    devices = tuple((device, str(name)) for device, name in config.get_device_backend_map().items())
    if any(name not in ("gloo", "nccl") for _, name in devices):
        group: tuple[Any, Any] = original(*args, **kwargs)
        return group
    _check(asked)
    existing = asked.pg_tag not in (None, "") and c10d._find_pg_by_ranks_and_tag(
        asked.pg_tag, asked.global_ranks_in_group
    )
    if existing:
        return existing, c10d._world.pg_map[existing][1]
    if asked.global_ranks_in_group and dist.get_rank() not in asked.global_ranks_in_group:
        return dist.GroupMember.NON_GROUP_MEMBER, None
    store = PrefixStore(f"{asked.group_name}/", asked.store)
    made = registry.create(_spec(asked, devices), store)
    _enter(made, asked, store, str(config))
    return made, store


def _check(asked: _Asked) -> None:
    """The checks of torch's own function, with its messages."""
    if asked.group_name in c10d._world.pg_names.values():
        raise ValueError(
            "The specified group name has already been created, please use a different group name"
        )
    if asked.device_id is not None and (asked.device_id.index is None or asked.device_id.type == "cpu"):
        raise ValueError("init_process_group device_id parameter must be an accelerator with an index")
    c10d._check_valid_timeout(asked.timeout)


def _spec(asked: _Asked, devices: tuple[tuple[str, str], ...]) -> GroupSpec:
    return GroupSpec(
        name=str(asked.group_name),
        description="undefined" if asked.group_desc is None else asked.group_desc,
        ranks=tuple(asked.global_ranks_in_group or range(asked.group_size)),
        rank=asked.group_rank,
        backend=str(asked.backend),
        devices=devices,
        timeout=asked.timeout,
        options=asked.backend_options,
        device=asked.device_id,
    )


def _enter(group: ElasticProcessGroup, asked: _Asked, store: Any, config: str) -> None:
    """Enters the group into torch's tables, as `_register_pg_in_world` does in 2.13."""
    world, name = c10d._world, asked.group_name
    world.pg_map[group] = (asked.backend, store)
    world.pg_names[group] = name
    world.pg_backend_config[group] = config
    _register_process_group(name, group)
    tag = f"ptd:{name}" if asked.pg_tag in (None, "") else f"user:{asked.pg_tag}"
    if asked.pg_tag in (None, ""):
        world.tags_to_pg.setdefault("", []).append(group)
    world.tags_to_pg.setdefault(tag, []).append(group)
    world.pg_to_tag[group] = tag


def _objects(registry: Registry, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """In shadow the source takes its own objects from the log too, as a receiver does: a fresh run id would differ."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    group = given.get("group") or c10d._get_default_group()
    own, size = dist.get_rank(group), dist.get_world_size(group)
    source = given.get("group_src")
    if source is None:
        source = dist.get_group_rank(group, given.get("src") or 0)
    if registry.shadow and source == own and size > 1:
        given.pop("group_src", None)
        given["src"] = dist.get_global_rank(group, (own + 1) % size)
    original(**given)


def _destroy(registry: Registry, original: Callable[..., None], group: Any = None) -> None:
    """`destroy_process_group`: a rank that has come to its end may be needed by one that is lost before."""
    whole = group is None or group == dist.group.WORLD
    before = registry.engine.ending
    registry.engine.ending = before or (whole and registry.engine.calls > 0)
    try:
        original(group)
    finally:
        registry.engine.ending = before


def _barrier(registry: Registry, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`_store_based_barrier`, on TORCH_DIST_INIT_BARRIER=1: a replacement in shadow meets nobody."""
    return None if registry.shadow else original(*args, **kwargs)


def _batch(original: Callable[..., Any], p2p_op_list: list[Any]) -> Any:
    """`batch_isend_irecv`: torch coalesces only on a group that is exactly its own class, as NCCL needs it."""
    first = p2p_op_list[0] if p2p_op_list else None
    group = getattr(first, "group", None) or dist.group.WORLD
    if first is None or not isinstance(group, ElasticProcessGroup) or "nccl" not in group.spec.backends:
        return original(p2p_op_list)
    device = first.tensor.device
    if not group._get_backend(device).supports_coalescing:
        return original(p2p_op_list)
    c10d._check_p2p_op_list(p2p_op_list)
    with c10d._coalescing_manager(group, device, async_ops=True) as manager:
        for op in p2p_op_list:
            op.op(op.tensor, op.peer, group=op.group, tag=op.tag)
    return manager.works
