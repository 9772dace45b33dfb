"""Payloads of stage reports, opaque to the protocol: what a rank says of its part in a recovery."""

from __future__ import annotations

import msgspec


class RestoredReport(msgspec.Struct, frozen=True):
    """A replacement has its state: bytes copied, seconds for copying and verifying."""

    bytes: int
    seconds: float


class RebuiltReport(msgspec.Struct, frozen=True):
    """How many process groups a rank rebuilt, kept, and left to their next use, and in how many seconds."""

    rebuilt: int
    kept: int
    lazy: int
    seconds: float
