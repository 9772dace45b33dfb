"""Where the copies of a tensor are, as torch knows it: DTensors on meshes, DDP's groups, the state of FSDP2.

Read in torch 2.13: `torch/distributed/tensor/_api.py`, `device_mesh.py`, `fsdp/_fully_shard`. A set of ranks is a
sorted tuple; `EVERYBODY`, the empty one, stands for all ranks of the job.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import StateMismatchError

__all__ = [
    "EVERYBODY",
    "Ranks",
    "Sharding",
    "accumulates",
    "ddp_of",
    "fsdp_roots",
    "forget",
    "group_ranks",
    "is_sharded",
    "local",
    "mesh_ranks",
    "normal",
    "replicas",
    "same_place",
    "settle",
    "sharding",
    "wrap",
]

Ranks = tuple[int, ...]
EVERYBODY: Ranks = ()
_ddp_ranks: weakref.WeakKeyDictionary[nn.Module, Ranks] = (
    weakref.WeakKeyDictionary()
)  # a group may be destroyed
_PLAIN_TYPES = (torch.Tensor, nn.Parameter)


class Sharding(msgspec.Struct, frozen=True):
    """What makes a DTensor of a local tensor.

    Attributes:
        shape, stride: of the whole tensor.
        placements: one per dimension of the mesh, as torch prints them.
        mesh: shape and names of the mesh's dimensions.
        place: which part this rank has, its coordinates on the dimensions that are not replicated.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    placements: tuple[str, ...]
    mesh: str
    place: tuple[int, ...] = ()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Does not import the package of DTensor where nobody has."""
    return type(tensor) not in _PLAIN_TYPES and hasattr(tensor, "_local_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this rank holds of a tensor; a tensor that is not sharded is its own."""
    found: torch.Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def sharding(tensor: torch.Tensor) -> Sharding | None:
    """How a DTensor is made of its local part, None for other tensors."""
    if not is_sharded(tensor):
        return None
    spec: Any = tensor._spec  # type: ignore[attr-defined]
    placements, mesh, place = _words(spec.mesh, spec.placements)
    return Sharding(tuple(tensor.shape), tuple(tensor.stride()), placements, mesh, place)


@functools.cache
def _words(mesh: Any, placements: tuple[Any, ...]) -> tuple[tuple[str, ...], str, tuple[int, ...]]:
    here = zip(placements, mesh.get_coordinate(), strict=True)
    place = tuple(at for placement, at in here if not placement.is_replicate())
    return tuple(map(str, placements)), _mesh_words(mesh), place


def forget() -> None:
    """The script is run again: its meshes are not kept."""
    for cached in (_words, _ranks_of, _same_shard, same_place):
        cached.cache_clear()


def wrap(data: torch.Tensor, wanted: Sharding, near: torch.Tensor | None, key: str) -> torch.Tensor:
    """A DTensor of this local part on the mesh of `near`. StateMismatchError if `near` is not on such a mesh."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    spec: Any = getattr(near, "_spec", None)
    if spec is None or _mesh_words(spec.mesh) != wanted.mesh:
        raise StateMismatchError(f"{key} is sharded on mesh {wanted.mesh} on the survivors, and not here.")
    known = {str(placement): placement for placement in spec.placements}
    known |= {str(placement): placement for placement in [Replicate(), *map(Shard, range(data.dim()))]}
    missing = [name for name in wanted.placements if name not in known]
    if missing:
        raise StateMismatchError(
            f"{key} is placed as {missing[0]} on the survivors, which is not known here."
        )
    placements = [known[name] for name in wanted.placements]
    with torch.no_grad():
        return DTensor.from_local(
            data,
            spec.mesh,
            placements,
            run_check=False,
            shape=torch.Size(wanted.shape),
            stride=wanted.stride,
        )


def _mesh_words(mesh: Any) -> str:
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    return ", ".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True))


def replicas(tensor: torch.Tensor) -> Ranks:
    """The ranks that hold the same bytes as this rank of a DTensor: those that differ on replicated dimensions only."""
    spec: Any = tensor._spec  # type: ignore[attr-defined]
    return _same_shard(spec.mesh, spec.placements)


@functools.cache
def _ranks_of(mesh: Any) -> list[int]:
    """Cached, since a mesh does not know its ranks any more once the script has left its process group."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


@functools.cache
def _same_shard(mesh: Any, placements: tuple[Any, ...]) -> Ranks:
    here = zip(placements, mesh.get_coordinate(), strict=True)
    index = tuple(slice(None) if placement.is_replicate() else place for placement, place in here)
    return normal(mesh.mesh[index].flatten().tolist())


def mesh_ranks(tensors: Iterable[torch.Tensor]) -> Ranks | None:
    """All ranks of the meshes that the DTensors among these are on; None without one.

    The smallest mesh counts: what is not sharded in a model is the same on at least those ranks.
    """
    found = {id(mesh): mesh for tensor in tensors if is_sharded(tensor) for mesh in [tensor._spec.mesh]}  # type: ignore[attr-defined]
    ranks = [_ranks_of(mesh) for mesh in found.values()]
    smallest = min(ranks, key=len, default=None)
    return None if smallest is None else normal(smallest)


def group_ranks(group: Any) -> Ranks:
    """Members of a process group, of a device mesh, or of a sequence of ranks."""
    if isinstance(group, dist.ProcessGroup):
        return normal(dist.get_process_group_ranks(group))
    ranks = getattr(group, "mesh", group)
    return normal(ranks.flatten().tolist() if isinstance(ranks, torch.Tensor) else ranks)


def normal(ranks: Iterable[int]) -> Ranks:
    """Sorted, and EVERYBODY if it is."""
    result = tuple(sorted(set(map(int, ranks))))
    world = int(os.environ.get("WORLD_SIZE", "1"))  # the script may have left its process group
    return EVERYBODY if result == tuple(range(world)) else result


@functools.cache
def same_place(members: tuple[int, ...], rank: int, replicas: Ranks) -> Ranks:
    """The ranks at this rank's place in groups like its own, among those that hold the same parameters.

    That is known where groups lie as those of a mesh with a dimension for them, rows or columns or between; elsewhere
    the answer is this rank alone.
    """
    holders = replicas or tuple(range(int(os.environ.get("WORLD_SIZE", "1"))))
    if not set(members) <= set(holders):
        return normal([rank])
    places, size = [holders.index(member) for member in members], len(members)
    step = places[1] - places[0] if size > 1 else 1
    as_mesh = (places[0] // step) % size == 0 and len(holders) % (size * step) == 0
    if not as_mesh or places != [places[0] + number * step for number in range(size)]:
        return normal([rank])
    at = members.index(rank)
    return normal(holder for place, holder in enumerate(holders) if (place // step) % size == at)


def ddp_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Ranks]]:
    """Path and ranks of each DistributedDataParallel among named modules."""
    for path, module in modules:
        if isinstance(module, DistributedDataParallel):
            if module not in _ddp_ranks:
                _ddp_ranks[module] = group_ranks(module.process_group)
            yield path, _ddp_ranks[module]


# ---- FSDP2


def fsdp_roots(modules: Iterable[nn.Module]) -> list[Any]:
    """The outermost modules of these, in order, that `fully_shard` was applied to."""
    found: list[Any] = []
    inside: set[int] = set()
    for module in modules:
        if hasattr(module, "_get_fsdp_state") and id(module) not in inside:
            found.append(module)
            inside.update(map(id, module.modules()))
    return found


def settle(root: Any, void: bool = False) -> None:
    """Bring an FSDP2 model to rest: nothing gathered, nothing under way, whatever an attempt left it in.

    Contacts nobody. The parameters are those that the optimizer has then. `void`: the attempt is undone, so gradients
    that it has accumulated without reducing them (`set_requires_gradient_sync(False)`) are dropped.
    """
    states, groups = _parts(root)
    if all(map(_at_rest, groups)) and not (void and any(map(_accumulated, groups))):
        return
    if states[0]._is_root:
        if not hasattr(root, "reset_iter_state"):
            raise StateMismatchError(
                f"FSDP2 of torch {torch.__version__} cannot leave a step in the middle: use torch 2.13 or newer."
            )
        root.reset_iter_state()
    for group in groups:
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if getattr(param, "_unsharded_param", None) is not None:
                param._unsharded_param.grad = None
        group._partial_reduce_output = None
        group._to_sharded()


def accumulates(root: Any) -> bool:
    """Whether an FSDP2 model holds gradients that were not reduced: they are in no tensor that an optimizer knows."""
    return any(map(_accumulated, _parts(root)[1]))


def _parts(root: Any) -> tuple[list[Any], list[Any]]:
    """The states and the groups of parameters in a model."""
    states = [module._get_fsdp_state() for module in root.modules() if hasattr(module, "_get_fsdp_state")]
    return states, [group for state in states for group in _param_groups(state)]


def _accumulated(group: Any) -> bool:
    if getattr(group, "_partial_reduce_output", None) is not None:
        return True
    return any(map(_holds_gradient, group.fsdp_params))


def _holds_gradient(param: Any) -> bool:
    """It stands in one of two places, depending on the dtype in which gradients are reduced."""
    unsharded = getattr(param, "_unsharded_param", None)
    if param.unsharded_accumulated_grad is not None:
        return True
    return unsharded is not None and unsharded.grad is not None


def _param_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # several since torch 2.12
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def _at_rest(group: Any) -> bool:
    return (
        group.is_sharded
        and group._training_state.name == "IDLE"
        and group._all_gather_result is None
        and not group._post_forward_indices
    )
