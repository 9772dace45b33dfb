"""State of torch.optim optimizers: what they keep per parameter, and the hyperparameters of their groups.

A parameter is named by its module, so that a replacement finds state by name whatever the order of the groups, and can
rebuild groups that the survivors added later (add_param_group). `Optimizer.load_state_dict` is not used: it copies
every tensor and runs the user's hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch.optim import Optimizer

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.holder import Found, Holder, Maker, ParamNames
from checkpointless_elastic.state.pieces import OPTIMIZER, PARAMETER
from checkpointless_elastic.state.sharding import Ranks, is_sharded, replicas
from checkpointless_elastic.state.tree import pack, tensors_of, unpack

__all__ = ["OptimizerHolder"]

_params = itemgetter("params")


class OptimizerHolder(Holder):
    """One optimizer. Its state may appear later (first step) or change its structure (LBFGS).

    `keeper`: the optimizer that keeps the state, where another one has the groups.
    """

    def __init__(
        self, name: str, optimizer: Optimizer, names: ParamNames, keeper: Optimizer | None = None
    ) -> None:
        super().__init__(name)
        self._optimizer = optimizer
        self._keeper = keeper or optimizer
        self._names = names
        self._seen: list[Any] = []
        self._values: list[Any] = []  # all that the groups held when that was last seen; cheaper to look at

    def tensors(self) -> Iterator[Found]:
        self._seen, self._values = self._watched(), []
        for number, group in enumerate(self._optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                if self._names.key(param) is None:
                    self._names.add(f"{self.name}.group{number}.params.{index}", param)
                    yield Found(f"{self.name}.group{number}.params.{index}", PARAMETER, param)
            for path, tensor in tensors_of(_hyper(group), f"{self.name}.group{number}"):
                yield Found(
                    path, OPTIMIZER, tensor, self._replicas(next(iter(group["params"]), None), tensor)
                )
        for path, param, value in self._states():
            for key, tensor in tensors_of(value, path):
                yield Found(key, OPTIMIZER, tensor, self._state_replicas(param, tensor))

    def _state_replicas(self, param: Any, tensor: torch.Tensor) -> Ranks | None:
        """Those that hold a tensor of the state of a parameter."""
        return self._replicas(param, tensor)

    def _replicas(self, param: Any, tensor: torch.Tensor) -> Ranks | None:
        """Those that hold the parameter too; a DTensor whose placements differ from the parameter's says it itself."""
        if not isinstance(param, torch.Tensor):
            return None
        own = is_sharded(tensor) and replicas(tensor) != replicas(param)
        return None if own else self._names.replicas(param)

    def _states(self) -> Iterator[tuple[str, Any, Any]]:
        """Path, key in `optimizer.state` and value, in the order of the keeper's groups."""
        state = self._keeper.state
        params = [param for group in self._keeper.param_groups for param in group["params"]]
        for param in params:
            if param in state:
                yield f"{self.name}.state.{self._names.key(param)}", param, state[param]
        known = {id(param) for param in params}
        for key in sorted((key for key in state if id(key) not in known), key=str):
            if isinstance(key, torch.Tensor):
                raise StateMismatchError(
                    f"{self.name} keeps state for a tensor that is in none of its groups."
                )
            yield f"{self.name}.state.{key}", key, state[key]

    def containers(self) -> Iterator[dict[Any, Any]]:
        yield self._keeper.state
        yield from (value for value in self._keeper.state.values() if isinstance(value, dict))

    def stale(self) -> bool:
        groups = self._optimizer.param_groups
        values = list(chain.from_iterable([*map(dict.values, groups), *map(_params, groups)]))
        if _identical(values, self._values):
            return False
        if not _identical(self._watched(), self._seen):
            return True
        self._values = values  # a learning rate
        return False

    def _watched(self) -> list[Any]:
        """What the groups hold that can be a piece: parameters, and hyperparameters that are tensors."""
        groups = self._optimizer.param_groups
        found: list[Any] = []
        for group in groups:
            found += group["params"]
            found += [value for value in group.values() if isinstance(value, torch.Tensor)]
        return found

    def note(self) -> Any:
        """The groups' hyperparameters; tensors among them are pieces and come back on their own."""
        groups = self._optimizer.param_groups
        return list(groups), [{**group, "params": list(group["params"])} for group in groups]

    def put_back(self, noted: Any) -> None:
        groups, contents = noted
        self._optimizer.param_groups[:] = groups
        for group, content in zip(groups, contents, strict=True):
            group["params"][:] = content["params"]
            group.update((key, value) for key, value in content.items() if key != "params")
            for key in set(group) - set(content):
                del group[key]

    def plain(self) -> Any:
        groups = [
            (
                [self._names.key(param) for param in group["params"]],
                pack(_hyper(group), f"{self.name}.group{n}", _all),
            )
            for n, group in enumerate(self._optimizer.param_groups)
        ]
        states = [
            (self._names.key(key) if isinstance(key, torch.Tensor) else None, key, pack(value, path, _all))
            for path, key, value in self._states()
        ]
        return {
            "groups": groups,
            "states": [(name, key if name is None else None, node) for name, key, node in states],
        }

    def adopt(self, plain: Any, maker: Maker) -> None:
        live = {found.key: found.tensor for found in self.tensors()}
        self._adopt_groups(plain["groups"], live, maker)
        self._groups_adopted()
        self._adopt_states(plain["states"], live, maker)

    def _groups_adopted(self) -> None:
        """The groups are those of the survivors."""

    def _adopt_groups(self, groups: Any, live: Mapping[str, torch.Tensor], maker: Maker) -> None:
        mine = self._optimizer.param_groups
        while len(mine) < len(groups):
            mine.append({})
        del mine[len(groups) :]
        for group, (keys, node) in zip(mine, groups, strict=True):
            params = [self._names.param(key, self.name) for key in keys]
            near = params[0] if params else None
            hyper = unpack(node, lambda path, near=near: maker.tensor(path, live.get(path), near))  # type: ignore[misc]
            held = group.get("params", [])
            keep = len(held) == len(params) and all(map(is_, held, params))
            group.clear()
            group.update(params=held if keep else params, **hyper)

    def _adopt_states(self, states: Any, live: Mapping[str, torch.Tensor], maker: Maker) -> None:
        state = self._keeper.state
        before = dict(state)
        state.clear()
        for name, plain_key, node in states:
            param = None if name is None else self._names.param(name, self.name)
            value = unpack(node, lambda path, near=param: maker.tensor(path, live.get(path), near))  # type: ignore[misc]
            key = plain_key if param is None else param
            held = before.get(key)
            if isinstance(held, dict) and isinstance(value, dict):
                held.clear()
                held.update(value)
                value = held
            state[key] = value

    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        """Nothing is left to do: `adopt` has set all values that are not tensors."""


def _identical(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _hyper(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _all(_path: str, _tensor: torch.Tensor) -> bool:
    return True
