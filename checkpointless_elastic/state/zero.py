"""State of torch's ZeroRedundancyOptimizer: all ranks have its groups, each has the optimizer state of its own part.

Read in torch 2.13 (`torch/distributed/optim/zero_redundancy_optimizer.py`): `optim` updates this rank's part of the
parameters and keeps their state; each step takes the hyperparameters from the outer groups and brings them back, then
sends the parameters around. Which parameters are whose follows from the groups. `state` of the outer optimizer is read
by nobody (load_state_dict leaves copies there), so it is no part of a Run. tests/state/test_zero.py fails if one of
these changes.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.holder import Maker, ParamNames
from checkpointless_elastic.state.optimizers import OptimizerHolder
from checkpointless_elastic.state.sharding import Ranks, same_place

__all__ = ["ZeroHolder", "is_zero"]

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_members: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = (
    weakref.WeakKeyDictionary()
)  # a group may be destroyed


def is_zero(value: Any) -> bool:
    """Whether it is a ZeroRedundancyOptimizer. Does not import its module where nobody has."""
    return isinstance(value, getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", ()))


class ZeroHolder(OptimizerHolder):
    """One ZeroRedundancyOptimizer.

    Its state is this rank's alone where its group has all ranks that hold the parameters; with a group of some of them
    the ranks at the same place of the other groups hold the same.
    """

    def __init__(self, name: str, zero: Any, names: ParamNames) -> None:
        super().__init__(name, zero, names, keeper=zero.optim)
        self._zero = zero
        if zero not in _members:
            _members[zero] = tuple(dist.get_process_group_ranks(zero.process_group))
        self._buckets = zero._buckets
        self._data = self._views()

    def _state_replicas(self, param: Any, tensor: torch.Tensor) -> Ranks | None:
        holders = self._replicas(param, tensor) or ()
        return same_place(_members[self._zero], self._zero.global_rank, holders)

    def _views(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parameters and their memory, where that is in buckets (parameters_as_bucket_view)."""
        if not self._zero.parameters_as_bucket_view:
            return []
        return [(param, param.data) for group in self._zero.param_groups for param in group["params"]]

    def stale(self) -> bool:
        """New buckets are new memory of the parameters: made when others are trained than before."""
        return self._zero._buckets is not self._buckets or super().stale()

    def note(self) -> Any:
        return super().note(), self._zero._is_trainable_mask, self._buckets, self._data

    def put_back(self, noted: Any) -> None:
        """The buckets too: the next step then finds, as the first try did, that others are trained."""
        groups, self._zero._is_trainable_mask, buckets, memory = noted
        if self._zero._buckets is not buckets:
            for param, data in memory:
                param.data = data
            self._zero._buckets = buckets
        super().put_back(groups)
        self._groups_adopted()

    def plain(self) -> Any:
        return {**super().plain(), "part": self._part()}

    def _part(self) -> list[str | None]:
        """Names of the parameters that this rank updates."""
        return [
            self._names.key(param) for group in self._zero.optim.param_groups for param in group["params"]
        ]

    def adopt(self, plain: Any, maker: Maker) -> None:
        super().adopt(plain, maker)
        if self._part() != plain["part"]:
            raise StateMismatchError(
                f"{self.name} updates other parameters here than where its state comes from, since its group has "
                "another size: its state cannot be taken over."
            )

    def _groups_adopted(self) -> None:
        """Let the parts be those of the groups, and the inner optimizer have its own."""
        zero = self._zero
        mine = [param for group in zero.param_groups for param in group["params"]]
        if len(zero._param_to_rank) != len(mine) or not all(param in zero._param_to_rank for param in mine):
            zero._clear_cache()
            zero.optim.param_groups[:] = zero._partition_parameters()[zero.rank]
            zero._build_param_buckets()
