"""Does the device of this process work? Asked in a replacement, before it joins."""

from __future__ import annotations

import torch

__all__ = ["broken_device", "why_broken"]

_NUMBERS = 1 << 16


def broken_device() -> str:
    """Why the GPU that this process uses does not work, as a sentence without its end; '' if it does, or uses none."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    return why_broken(torch.device("cuda", torch.cuda.current_device()))


def why_broken(device: torch.device) -> str:
    """Asks a device for a small sum. Blocks until it answers."""
    try:
        numbers = torch.arange(_NUMBERS, device=device)
        found = int((numbers * 2 + 1).sum())  # the first n odd numbers make n squared
    except RuntimeError as error:
        return f"{device} does not compute ({str(error).splitlines()[0]})"
    return "" if found == _NUMBERS**2 else f"{device} computes wrong: {found} in place of {_NUMBERS**2}"
