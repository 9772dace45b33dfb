"""Messages between an agent and its guardian, the agent of the next seat: copies of private state. See `between`."""

from __future__ import annotations

from checkpointless_elastic.protocol.messages import Message

__all__ = ["Copy", "Kept", "Lacking", "Ward"]


class Ward(Message, frozen=True):
    """The sender has this seat, the receiver guards it. ``wants``: send what is kept of these ranks."""

    seat: int
    ranks: list[int]
    wants: bool


class Copy(Message, frozen=True):
    """The private state of a rank.

    Attributes:
        generation, step: of the step that the rank was ready for when this was sent; step -1: for none.
        numbers: parts of the blob; those not in ``parts`` the receiver has.
        log: entries of the startup log, if they are sent along.
    """

    rank: int
    generation: int
    step: int
    blob: bytes
    numbers: list[int]
    parts: dict[int, bytes]
    log: list[bytes] | None = None


class Lacking(Message, frozen=True):
    """The guardian lacks parts that the last Copy of this rank builds on: send it whole."""

    rank: int


class Kept(Message, frozen=True):
    """All that the guardian has of a seat's ranks, whole."""

    copies: list[Copy]
