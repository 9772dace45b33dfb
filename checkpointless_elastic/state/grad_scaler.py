"""State of torch.amp.GradScaler, read from its attributes.

Private detail of torch, read in 2.6 to 2.13: `_scale` and `_growth_tracker` are None until the first `scale()`, then
tensors of one element written in place by `update()`; `_per_optimizer_states` says which optimizers were unscaled in
this step. Its state_dict() would wait for the device at every step and does not show the latter.
tests/state/test_grad_scaler.py fails when the names change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from checkpointless_elastic.errors import UnsupportedTorchError
from checkpointless_elastic.state.holder import Found, Holder, Maker
from checkpointless_elastic.state.pieces import OBJECT

__all__ = ["ScalerHolder"]

_TENSORS = ("_scale", "_growth_tracker")
_PLAIN = (
    "_enabled",
    "_init_scale",
    "_init_growth_tracker",
    "_growth_factor",
    "_backoff_factor",
    "_growth_interval",
)


class ScalerHolder(Holder):
    """A GradScaler (also those of FSDP, which derive from it)."""

    def __init__(self, name: str, scaler: GradScaler) -> None:
        super().__init__(name)
        self._scaler = scaler
        self._seen: dict[str, torch.Tensor | None] = {}
        if not scaler.is_enabled():
            return
        missing = [key for key in (*_TENSORS, *_PLAIN, "_per_optimizer_states") if not hasattr(scaler, key)]
        if missing:
            raise UnsupportedTorchError(
                f"GradScaler of torch {torch.__version__} has no {', '.join(missing)}: use torch 2.6 to 2.13."
            )

    def tensors(self) -> Iterator[Found]:
        self._seen = {key: getattr(self._scaler, key, None) for key in _TENSORS}
        for key, tensor in self._seen.items():
            if tensor is not None:
                yield Found(f"{self.name}.{key}", OBJECT, tensor)

    def containers(self) -> Iterator[dict[Any, Any]]:
        return iter(())

    def stale(self) -> bool:
        return any(getattr(self._scaler, key, None) is not held for key, held in self._seen.items())

    def plain(self) -> Any:
        present = [key for key in _TENSORS if getattr(self._scaler, key, None) is not None]
        return present, {key: getattr(self._scaler, key) for key in _PLAIN if hasattr(self._scaler, key)}

    def adopt(self, plain: Any, maker: Maker) -> None:
        present, _ = plain
        for key in _TENSORS:
            if key in present:
                held = getattr(self._scaler, key, None)
                setattr(self._scaler, key, maker.tensor(f"{self.name}.{key}", held, held))
            elif hasattr(self._scaler, key):
                setattr(self._scaler, key, None)

    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        for key, value in plain[1].items():
            setattr(self._scaler, key, value)

    def note(self) -> Any:
        """The tensors of today (made in this attempt: they go again) and what was unscaled."""
        states = getattr(self._scaler, "_per_optimizer_states", {})
        held = {
            key: getattr(self._scaler, key, None)
            for key in (*_TENSORS, *_PLAIN)
            if hasattr(self._scaler, key)
        }
        return held, [
            (key, {**state, "found_inf_per_device": dict(state["found_inf_per_device"])})
            for key, state in states.items()
        ]

    def put_back(self, noted: Any) -> None:
        held, unscaled = noted
        for key, value in held.items():
            setattr(self._scaler, key, value)
        states = getattr(self._scaler, "_per_optimizer_states", None)
        if states is not None:
            states.clear()
            states.update(unscaled)
