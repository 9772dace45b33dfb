"""State of torch.nn modules: parameters, buffers (non-persistent ones too), extra state and flags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import ConfigError, StateMismatchError
from checkpointless_elastic.state import sharding
from checkpointless_elastic.state.holder import Found, Holder, Maker, ParamNames
from checkpointless_elastic.state.pieces import BUFFER, PARAMETER
from checkpointless_elastic.state.sharding import Ranks
from checkpointless_elastic.state.tree import copy_plain, same

__all__ = ["ModuleHolder"]

_training = attrgetter("training")
_requires_grad = attrgetter("requires_grad")
_forward_sync = attrgetter("require_forward_param_sync")


class ModuleHolder(Holder):
    """A module, wrapped by DDP or torch.compile or not. Tied weights are found once.

    The flags `training` and `requires_grad`, and DDP's own, are state too: a replacement enters a step without running
    what came before it, so `model.eval()` or a layer frozen after the first epoch would be missed.

    Attributes:
        sharded: the outermost modules of FSDP2 in it.
    """

    def __init__(self, name: str, module: nn.Module, names: ParamNames) -> None:
        super().__init__(name)
        self.module = module
        self._names = names
        self._modules: list[tuple[str, nn.Module]] = []
        self._flat: list[nn.Module] = []
        self._extra: list[tuple[str, nn.Module]] = []
        self._params: list[torch.Tensor] = []
        self.sharded: list[Any] = []
        self._replicated: dict[str, Ranks] = {}
        self._ddp: list[DistributedDataParallel] = []
        self._mesh: Ranks | None = None

    def tensors(self) -> Iterator[Found]:
        self._walk()
        for path, module in self._modules:
            for key, param in module._parameters.items():
                if param is not None:
                    yield Found(f"{path}.{key}", PARAMETER, param, self._names.replicas(param))
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    yield Found(f"{path}.{key}", BUFFER, buffer, self._replicas(path, buffer))

    def numbers(self) -> dict[str, float]:
        """What modules of the user's own classes hold as plain numbers. It is not state: nobody brings it back."""
        return {
            f"{path}.{name}": value
            for path, module in self._modules
            if any(not base.__module__.startswith("torch.") for base in type(module).__mro__[:-1])
            for name, value in vars(module).items()
            if type(value) in (int, float)
        }

    def _walk(self) -> None:
        """Find the modules again, name the parameters."""
        named = list(self.module.named_modules())
        self._modules = [(f"{self.name}.{path}" if path else self.name, module) for path, module in named]
        self._flat = [module for _, module in self._modules]
        self._extra = [(path, module) for path, module in self._modules if _has_extra_state(module)]
        self.sharded = sharding.fsdp_roots(self._flat)
        self.settle()
        named_params = [
            (f"{path}.{key}", path, param)
            for path, module in self._modules
            for key, param in module._parameters.items()
            if param is not None
        ]
        self._replicated = dict(sharding.ddp_of(self._modules))
        self._ddp = [module for module in self._flat if isinstance(module, DistributedDataParallel)]
        self._mesh = sharding.mesh_ranks(param for _, _, param in named_params)
        for key, path, param in named_params:
            self._names.add(key, param, self._replicas(path, param))
        self._params = list({id(param): param for _, _, param in named_params}.values())

    def _replicas(self, path: str, tensor: torch.Tensor) -> Ranks | None:
        """The ranks of the DDP around it, else what a DTensor says; else those that the model's DTensors are on."""
        for around, ranks in self._replicated.items():
            if path == around or path.startswith(f"{around}."):
                return ranks
        return None if sharding.is_sharded(tensor) else self._mesh

    def settle(self, void: bool = False) -> None:
        """Bring FSDP2 to rest: at start and gate of an attempt, or to undo one (`void`). Contacts nobody."""
        for root in self.sharded:
            sharding.settle(root, void)

    def check_start(self) -> None:
        """Raise ConfigError if there are gradients that a replayable call cannot begin with."""
        if any(map(sharding.accumulates, self.sharded)):
            raise ConfigError(
                f"{self.name} holds gradients of an earlier call that are not reduced yet "
                "(set_requires_gradient_sync(False) or set_requires_all_reduce(False)); they would be lost with their "
                "rank. Accumulate inside one replayable function."
            )

    def containers(self) -> Iterator[dict[Any, Any]]:
        for module in self._flat:
            for content in (module._parameters, module._buffers, module._modules):
                if content:
                    yield cast(dict[Any, Any], content)

    def plain(self) -> Any:
        return {
            "flags": self._flags(),
            "extra": {path: _extra_state(module) for path, module in self._extra},
        }

    def adopt(self, plain: Any, maker: Maker) -> None:
        """Modules are built by the script: a difference is found by the inventory's comparison."""

    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        if list(map(len, plain["flags"])) != list(map(len, self._flags())):
            raise StateMismatchError(
                f"{self.name} has another number of modules or parameters than on the survivors."
            )
        self._set_flags(*plain["flags"])
        for path, module in self._extra:
            if path in plain["extra"]:
                module.set_extra_state(plain["extra"][path])

    def _flags(self) -> tuple[list[bool], list[bool], list[bool]]:
        """Of modules: training. Of parameters: requires_grad. Of DDP: whether the next forward sends buffers around."""
        return (
            list(map(_training, self._flat)),
            list(map(_requires_grad, self._params)),
            list(map(_forward_sync, self._ddp)),
        )

    def _set_flags(
        self, training: Iterable[bool], requires_grad: Iterable[bool], forward_sync: Iterable[bool]
    ) -> None:
        for module, flag in zip(self._flat, training, strict=True):
            if module.training != flag:
                module.training = flag
        for param, flag in zip(self._params, requires_grad, strict=True):
            if param.requires_grad != flag:
                param.requires_grad_(flag)
        for ddp, flag in zip(self._ddp, forward_sync, strict=True):
            ddp.require_forward_param_sync = flag

    def note(self) -> Any:
        return self._flags(), [copy_plain(_extra_state(module), _clone_all) for _, module in self._extra]

    def put_back(self, noted: Any) -> None:
        flags, extra = noted
        self._set_flags(*flags)
        for (_, module), value in zip(self._extra, extra, strict=True):
            if not same(_extra_state(module), value):
                module.set_extra_state(value)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _extra_state(module: nn.Module) -> Any:
    return module.get_extra_state()


def _clone_all(_tensor: torch.Tensor) -> bool:
    return False
