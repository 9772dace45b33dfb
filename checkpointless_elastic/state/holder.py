"""The seam between an inventory and the kinds of objects that hold state: modules, optimizers, scalers, others.

A holder knows one object that the user named. It never runs the object's training code, and draws no random numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.arena import Arena
from checkpointless_elastic.state.pieces import MADE, PieceInfo, describe, make_tensor
from checkpointless_elastic.state.sharding import EVERYBODY, Ranks, is_sharded, replicas, wrap

__all__ = ["Found", "Holder", "Maker", "ParamNames"]


@dataclass(frozen=True, eq=False)
class Found:
    """A tensor that a holder found in its object.

    Attributes:
        replicas: the ranks that hold the same bytes; None where the holder knows only what the tensor says itself.
    """

    key: str
    role: str
    tensor: torch.Tensor
    replicas: Ranks | None = None


@dataclass
class ParamNames:
    """Names of the parameters: those of the modules, and of an optimizer where no module has them.

    Attributes:
        declared: by the beginning of a name, the ranks that the user says hold the same.
    """

    declared: dict[str, Ranks] = field(default_factory=dict)
    _keys: dict[int, str] = field(default_factory=dict)
    _params: dict[str, torch.Tensor] = field(default_factory=dict)
    _replicas: dict[int, Ranks] = field(default_factory=dict)

    def add(self, key: str, param: torch.Tensor, replicas: Ranks | None = None) -> None:
        """Name a parameter, unless it has a name (tied weights keep their first), and say who has the same."""
        if id(param) not in self._keys:
            self._keys[id(param)] = key
            self._params[key] = param
            self._replicas[id(param)] = self.claimed(Found(key, "", param, replicas))

    def claimed(self, found: Found) -> Ranks:
        """The ranks that hold the same bytes: as declared, else as the holder or the tensor says, else everybody."""
        declared = [ranks for key, ranks in self.declared.items() if f"{found.key}.".startswith(f"{key}.")]
        if declared:
            return declared[-1]
        if found.replicas is not None:
            return found.replicas
        return replicas(found.tensor) if is_sharded(found.tensor) else EVERYBODY

    def replicas(self, param: torch.Tensor) -> Ranks:
        """The ranks that hold the same bytes of a named parameter."""
        return self._replicas[id(param)]

    def key(self, param: torch.Tensor) -> str | None:
        """The parameter's name, or None."""
        return self._keys.get(id(param))

    def param(self, key: str, whose: str) -> torch.Tensor:
        """The parameter of that name, or StateMismatchError."""
        if key not in self._params:
            raise StateMismatchError(
                f"{whose} of the survivors has parameter {key}, which this rank does not have."
            )
        return self._params[key]

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """All names and parameters, in the order in which they were found."""
        return list(self._params.items())


class Maker:
    """Gives a replacement the tensors that a manifest asks for: the existing one if it fits, else a new one."""

    def __init__(self, pieces: tuple[PieceInfo, ...]) -> None:
        self._wanted = {info.key: info for info in pieces}
        self._arena = Arena(info for info in pieces if info.role in MADE)

    def wanted(self, key: str) -> PieceInfo | None:
        """The description of a piece, or None if the survivors do not have it."""
        return self._wanted.get(key)

    def tensor(self, key: str, existing: torch.Tensor | None, near: torch.Tensor | None) -> torch.Tensor:
        """The tensor for `key`; a new one is on the CPU or on the device of `near`, as the survivors' is."""
        info = self._wanted.get(key)
        if info is None:
            raise StateMismatchError(f"The survivors' manifest mentions {key} but does not describe it.")
        if existing is not None and describe(key, info.role, existing, info.replicas) == info:
            return existing
        device = (
            near.device if near is not None and near.device.type == info.device else torch.device(info.device)
        )
        made = self._arena.tensor(info) if device.type == "cpu" else None
        if made is None:
            made = make_tensor(info, device)
        return made if info.sharding is None else wrap(made, info.sharding, near, key)


class Holder(ABC):
    """One object named in `Run(...)`."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def tensors(self) -> Iterator[Found]:
        """All tensors but gradients, live, in an order that is the same on all ranks."""

    @abstractmethod
    def containers(self) -> Iterator[dict[Any, Any]]:
        """Dicts whose direct values a snapshot watches by identity and puts back."""

    @abstractmethod
    def plain(self) -> Any:
        """State that is not a piece, made of what torch.load(weights_only=True) reads."""

    @abstractmethod
    def adopt(self, plain: Any, maker: Maker) -> None:
        """Create and remove tensors so that they are those of the rank that `plain` and the maker come from."""

    @abstractmethod
    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        """Take over `plain`; the tensors are filled. No live tensor is replaced if the object allows it."""

    def stale(self) -> bool:
        """Whether `tensors` would find others than last time, where `containers` does not show it.

        Cheap; called right after `note`.
        """
        return False

    def note(self) -> Any:
        """State that `containers` does not show, copied, for `put_back`."""
        return None

    def put_back(self, noted: Any) -> None:  # noqa: B027
        """Undo what happened to that state since `note`."""
