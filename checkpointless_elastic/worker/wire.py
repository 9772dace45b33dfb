"""Payloads of stage reports, opaque to the protocol: what a rank says of its part in a recovery."""

from __future__ import annotations

import msgspec


class RestoredReport(msgspec.Struct, frozen=True):
    """A replacement has its state.

    Attributes:
        bytes: how many were copied.
        seconds: for all of it, tensors to be made and objects to be loaded included.
        copying: seconds of these in which bytes were copied and verified.
    """

    bytes: int
    seconds: float
    copying: float = 0.0


class RebuiltReport(msgspec.Struct, frozen=True):
    """How many process groups a rank rebuilt, kept, and left to their next use, and in how many seconds."""

    rebuilt: int
    kept: int
    lazy: int
    seconds: float
