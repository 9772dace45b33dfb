"""State of Hugging Face Accelerate's Accelerator: how far gradient accumulation is.

Read in accelerate 1.15 (`accelerator.py`, `state.py`): `accumulate()` counts its calls in `Accelerator.step`, and says
in the process's one GradientState whether this one ends with an update. Neither is in a state_dict().
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpointless_elastic.state.holder import Found, Holder, Maker

__all__ = ["AcceleratorHolder", "accumulates", "is_accelerator"]


def is_accelerator(value: Any) -> bool:
    """Whether it is an Accelerator. Does not import Accelerate where nobody has."""
    return isinstance(value, getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", ()))


def accumulates() -> bool:
    """Whether Accelerate accumulates gradients over several calls in this process."""
    kind = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return kind is not None and bool(kind._shared_state) and kind().num_steps > 1


class AcceleratorHolder(Holder):
    """One Accelerator."""

    def __init__(self, name: str, accelerator: Any) -> None:
        super().__init__(name)
        self._accelerator = accelerator

    def tensors(self) -> Iterator[Found]:
        return iter(())

    def containers(self) -> Iterator[dict[Any, Any]]:
        return iter(())

    def plain(self) -> Any:
        return self._accelerator.step, self._accelerator.sync_gradients

    def adopt(self, plain: Any, maker: Maker) -> None:
        """It has no tensors."""

    def load(self, plain: Any, live: Mapping[str, torch.Tensor]) -> None:
        self.put_back(plain)

    def note(self) -> Any:
        return self.plain()

    def put_back(self, noted: Any) -> None:
        self._accelerator.step, self._accelerator.sync_gradients = noted
