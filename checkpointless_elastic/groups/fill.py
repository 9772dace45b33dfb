"""Valid values for the outputs of a collective that has lost its peers.

Never uninitialised memory: a garbage index inside a kernel would kill the device's context. Written through `.data`,
since the native collective does not raise a tensor's version counter either.
"""

from __future__ import annotations

import torch

from checkpointless_elastic.groups.ops import Call, Op

__all__ = ["fill_locally", "fill_with_nan"]


def fill_locally(op: Op, call: Call) -> None:
    """What the collective would give with this rank as its only member; zeros where that has no shape here."""
    for output, source in op.fills(call):
        if source is not None and source.numel() == output.numel() and source.dtype == output.dtype:
            output.data.copy_(source.data.reshape(output.shape))
        else:
            output.data.zero_()


def fill_with_nan(op: Op, call: Call) -> list[torch.Tensor]:
    """Marks the outputs as worthless: NaN, or zero where the type has none. Returns them."""
    outputs = op.writes(call)
    for output in outputs:
        values = output.data._values() if output.is_sparse else output.data
        values.fill_(float("nan")) if _has_nan(values) else values.zero_()
    return outputs


def _has_nan(values: torch.Tensor) -> bool:
    """False too for the 8-bit types that cannot hold NaN or cannot be filled with it."""
    return values.is_complex() or (values.is_floating_point() and values.element_size() > 1)
