"""All state of a Run's objects: its pieces, what a replacement must know of them, and how it takes them over.

On a replacement the order of calls is `adopt(manifest)`, fill the tensors of `pieces()`, `load_meta(manifest)`. Nothing
here blocks or talks to a peer; all calls belong to the main thread, while no step runs.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from checkpointless_elastic.errors import ConfigError, StateMismatchError
from checkpointless_elastic.state.accelerator import AcceleratorHolder, is_accelerator
from checkpointless_elastic.state.grad_scaler import ScalerHolder
from checkpointless_elastic.state.holder import Found, Holder, Maker, ParamNames
from checkpointless_elastic.state.modules import ModuleHolder
from checkpointless_elastic.state.objects import ObjectHolder, TensorHolder
from checkpointless_elastic.state.optimizers import OptimizerHolder
from checkpointless_elastic.state.pieces import GRADIENT, Manifest, Piece, PieceInfo, gradient_key, piece_of
from checkpointless_elastic.state.sharding import Ranks
from checkpointless_elastic.state.zero import ZeroHolder, is_zero

__all__ = ["Inventory", "Scan", "flatten"]

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_LOCAL_SGD = "torch.distributed.optim.post_localSGD_optimizer"


@dataclass(frozen=True, eq=False)
class Scan:
    """What one look at the objects found.

    Attributes:
        pieces: all pieces but gradients.
        params: name and tensor of each parameter, tied ones once.
        containers: the dicts that the tensors stand in, see `Holder.containers`.
    """

    pieces: tuple[Piece, ...]
    params: tuple[tuple[str, torch.Tensor], ...]
    containers: tuple[dict[Any, Any], ...]


class Inventory:
    """The state of the objects named in `Run(...)`.

    Lists, tuples and dicts of objects are allowed. Raises ConfigError for an object that shows no state, and
    StateMismatchError for state that cannot travel.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = dict(objects)
        self.holders: list[Holder] = []
        self._sharded: list[ModuleHolder] = []
        self._declared: dict[str, Ranks] = {}
        self._names = ParamNames(self._declared)
        self.scan()
        self.check()

    def declare(self, key: str, ranks: Ranks) -> None:
        """Say which ranks hold the same bytes of all state whose name is `key` or begins with it and a dot.

        What an optimizer keeps for a parameter follows the parameter. Raises ConfigError if nothing has such a name.
        """
        known = [holder.name for holder in self.holders] + [piece.key for piece in self.pieces()]
        if not any(f"{name}.".startswith(f"{key}.") for name in known):
            raise ConfigError(
                f"Nothing in Run(...) is called {key}; the objects are {', '.join(self._objects)}."
            )
        self._declared[key] = ranks

    def settle(self, void: bool = False) -> None:
        """Bring models of FSDP2 to rest, see `ModuleHolder.settle`."""
        for holder in self._sharded:
            holder.settle(void)

    def check_start(self) -> None:
        """Raise ConfigError if a replayable call cannot begin with what the objects hold."""
        for holder in self._sharded:
            holder.check_start()

    def scan(self) -> Scan:
        """Look at all objects again. Costs some µs per tensor; `pieces` and `manifest` do it on their own."""
        self._names = ParamNames(self._declared)
        self.holders = list(_holders(self._objects, self._names))
        pieces: list[Piece] = []
        seen: set[object] = set()
        for holder in self.holders:
            for found in holder.tensors():
                self._add(pieces, seen, found)
        modules = [holder for holder in self.holders if isinstance(holder, ModuleHolder)]
        self._sharded = [holder for holder in modules if holder.sharded]
        containers = tuple(content for holder in self.holders for content in holder.containers())
        _check_unique(pieces)
        return Scan(tuple(pieces), tuple(self._names.items()), containers)

    def pieces(self) -> list[Piece]:
        """All live tensors, gradients last; same keys and order on all ranks that are at the same step."""
        found = self.scan()
        pieces = list(found.pieces)
        seen: set[object] = {_memory(piece.tensor, piece.info.nbytes) for piece in pieces}
        for key, param in found.params:
            if param.grad is not None:
                claimed = self._names.replicas(param)
                self._add(pieces, seen, Found(gradient_key(key), GRADIENT, param.grad, claimed))
        return pieces

    def _add(self, pieces: list[Piece], seen: set[object], found: Found) -> None:
        piece = piece_of(found.key, found.role, found.tensor, self._names.claimed(found))
        memory = _memory(piece.tensor, piece.info.nbytes)
        if memory not in seen:
            seen.add(memory)
            pieces.append(piece)

    def manifest(self) -> Manifest:
        """The description of this rank's state, for a replacement."""
        pieces = self.pieces()
        return Manifest(tuple(piece.info for piece in pieces), self._meta())

    def _meta(self) -> bytes:
        """What is not a tensor, as of the last scan's objects."""
        return _dump({holder.name: holder.plain() for holder in self.holders})

    def signs(self) -> tuple[bytes, list[int]]:
        """Other ones where the state has changed: what is not a tensor, and the versions of tensors but gradients."""
        pieces = self.scan().pieces
        versions = [tensor._version for piece in pieces for tensor in (piece.tensor, piece.outer)]
        return self._meta(), versions

    def numbers(self) -> dict[str, float]:
        """See `ModuleHolder.numbers`."""
        modules = [holder for holder in self.holders if isinstance(holder, ModuleHolder)]
        return {name: number for holder in modules for name, number in holder.numbers().items()}

    def check(self) -> None:
        """Raise StateMismatchError if an object's state could not be read by a replacement.

        To be called again after the first step, when optimizers have made their state.
        """
        for holder in self.holders:
            try:
                _load(_dump(holder.plain()))
            except Exception as error:
                raise StateMismatchError(
                    f"The state of {holder.name!r} holds something that torch.load(weights_only=True) does not read: "
                    f"make it plain, or allow it with torch.serialization.add_safe_globals. ({error})"
                ) from error

    def adopt(self, manifest: Manifest) -> None:
        """Create what is missing and remove what the survivors do not have; new tensors have undefined content.

        Afterwards `pieces()` is what the manifest describes, else StateMismatchError names the first difference.
        """
        plain = _load(manifest.meta)
        self.scan()
        names = [holder.name for holder in self.holders]
        if names != list(plain):
            raise StateMismatchError(f"Run(...) names {names} here and {list(plain)} on the survivors.")
        maker = Maker(manifest.pieces)
        for holder in self.holders:
            holder.adopt(plain[holder.name], maker)
        for key, param in self.scan().params:
            _adopt_gradient(param, gradient_key(key), maker)
        _compare([piece.info for piece in self.pieces()], manifest.pieces)

    def load_meta(self, manifest: Manifest) -> None:
        """Take over what is not a tensor; to be called once the tensors are filled."""
        plain = _load(manifest.meta)
        live = {piece.key: piece.outer for piece in self.pieces()}
        for holder in self.holders:
            holder.load(plain[holder.name], live)


def _holders(objects: Mapping[str, Any], names: ParamNames) -> Iterator[Holder]:
    """One holder per object, modules first, since they name the parameters."""
    flat = [pair for name, value in objects.items() for pair in flatten(name, value)]
    for name, value in flat:
        _refuse(name, value)
    for name, value in flat:
        if isinstance(value, nn.Module):
            yield ModuleHolder(name, value, names)
    for name, value in flat:
        if is_zero(value):
            yield ZeroHolder(name, value, names)
        elif isinstance(value, Optimizer):
            yield OptimizerHolder(name, value, names)
        elif isinstance(value, GradScaler):
            yield ScalerHolder(name, value)
        elif isinstance(value, torch.Tensor):
            yield TensorHolder(name, value)
        elif is_accelerator(value):
            yield AcceleratorHolder(name, value)
        elif not isinstance(value, nn.Module):
            yield _other(name, value)


def _refuse(name: str, value: Any) -> None:
    """Raise ConfigError for state that is not where torch shows it, so that it would be missed without a word.

    Read in torch 2.13: FSDP1's parameters are views of flat ones that it swaps, gathers and pads; a
    PostLocalSGDOptimizer trains other parameters on each rank, and averages them after its update.
    """
    if isinstance(value, nn.Module):
        fsdp = _known(_FSDP1, "FullyShardedDataParallel")
        if any(isinstance(module, fsdp) for module in value.modules()):
            raise ConfigError(
                f"Run({name}=...) got a model of FullyShardedDataParallel (FSDP1): shard it with "
                "torch.distributed.fsdp.fully_shard, on a mesh with a replicated dimension for live recovery."
            )
    if isinstance(value, _known(_LOCAL_SGD, "PostLocalSGDOptimizer")):
        raise ConfigError(
            f"Run({name}=...) got a PostLocalSGDOptimizer, with which parameters differ between the ranks: use the "
            "optimizer in it, and gradients that DDP averages at each step."
        )
    if is_zero(value) and value._overlap_with_ddp:
        raise ConfigError(
            f"Run({name}=...) got a ZeroRedundancyOptimizer with overlap_with_ddp=True, which updates parameters in "
            "the middle of backward, where nothing can be taken back: leave overlap_with_ddp off."
        )


def _known(module: str, name: str) -> type[Any] | tuple[()]:
    """A class of torch, if somebody has imported it: for isinstance."""
    found: type[Any] | tuple[()] = getattr(sys.modules.get(module), name, ())
    return found


def _other(name: str, value: Any) -> Holder:
    if not callable(getattr(value, "state_dict", None)) or not callable(
        getattr(value, "load_state_dict", None)
    ):
        raise ConfigError(
            f"Run({name}=...) got a {type(value).__name__}, which has no state_dict() and load_state_dict(): "
            "give it both, or leave it out."
        )
    return ObjectHolder(name, value)


def flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Objects in lists, tuples and dicts, with their names; None is skipped."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flatten(f"{name}.{index}", item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from flatten(f"{name}.{key}", item)
    elif value is not None:
        yield name, value


def _memory(tensor: torch.Tensor, nbytes: int) -> object:
    """Equal for two tensors that are the same memory read in the same way (tied weights, views of one another)."""
    if nbytes == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _check_unique(pieces: list[Piece]) -> None:
    keys: set[str] = set()
    for piece in pieces:
        if piece.key in keys:
            raise StateMismatchError(
                f"Two pieces of state have the name {piece.key}: rename one of the Run's objects."
            )
        keys.add(piece.key)


def _adopt_gradient(param: torch.Tensor, key: str, maker: Maker) -> None:
    grad = None if maker.wanted(key) is None else maker.tensor(key, param.grad, param)
    if param.grad is not grad:
        param.grad = grad


def _compare(mine: list[PieceInfo], theirs: tuple[PieceInfo, ...]) -> None:
    for index in range(max(len(mine), len(theirs))):
        left = mine[index] if index < len(mine) else None
        right = theirs[index] if index < len(theirs) else None
        if left != right:
            raise StateMismatchError(
                f"State differs from the survivors' at piece {index}: {_words(left)} here, {_words(right)} there."
            )


def _words(info: PieceInfo | None) -> str:
    if info is None:
        return "nothing"
    shape = f"{info.dtype} {list(info.shape)} strides {list(info.stride)} on {info.device}"
    shared = f", shared with {list(info.replicas)}" if info.replicas else ""
    sharded = f", {info.sharding.placements} of {info.sharding.mesh}" if info.sharding else ""
    return f"{info.key} ({info.role}, {shape}{shared}{sharded})"


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
