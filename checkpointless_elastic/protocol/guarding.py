"""Messages between an agent and its guardian, the agent of the next seat, which keeps copies of what its ranks hold.

There are two kinds of connections. On the first one goes what a step waits for: the private state of each rank that is
ready. Mirrors are large, so they have connections of their own, each of which a thread serves on either side (see
`agent.wire`). What opens one says `Bulk` and waits for the same word; then it may `Put` mirrors, or `Get` those that
are kept. Private state that is too large for a message goes there too (`Large`, `Recall`).
"""

from __future__ import annotations

import msgspec

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.messages import Message, Replicas

__all__ = [
    "Bulk",
    "Copy",
    "Done",
    "Get",
    "Holds",
    "Kept",
    "Lacking",
    "Large",
    "NONE",
    "OnBulk",
    "Put",
    "Recall",
    "Sent",
    "Version",
    "Ward",
    "decode_bulk",
]

Version = tuple[int, int]
"""Of a mirror: its step, and the generation in which it was begun: after all have gone back, a step is done again."""

NONE: Version = (-1, -1)
"""No mirror."""


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
        mirror: the newest mirror of the rank; the step is ready only when the guardian has it too.
    """

    rank: int
    generation: int
    step: int
    blob: bytes
    numbers: list[int]
    parts: dict[int, bytes]
    log: list[bytes] | None = None
    mirror: Version = NONE


class Lacking(Message, frozen=True):
    """The guardian lacks parts that the last Copy of this rank builds on: send it whole."""

    rank: int


class Holds(Message, frozen=True):
    """What a rank holds, as it said after the first step: a new coordinator asks the agent of its seat."""

    rank: int
    held: Replicas


class Kept(Message, frozen=True):
    """All that the guardian has of a seat's ranks, whole. ``held``: by rank, see Holds; ``large``: ranks whose copies
    are too large for a message, see Recall.
    """

    copies: list[Copy]
    held: dict[int, Replicas] = {}
    large: list[int] = []


class Bulk(Message, frozen=True):
    """First word, both ways, on a connection for mirrors."""


# ---- on a connection for mirrors -------------------------------------------------------------------------------------


class Put(Message, frozen=True):
    """A mirror: the bytes of its files follow, one after the other, then Sent.

    Attributes:
        generation: in force where it is sent from.
        version: see Version.
        entry: what it says of itself, see `worker.mirror.Entry`.
        sizes: of its files, in the order in which the entry names them.
    """

    rank: int
    generation: int
    version: Version
    entry: bytes
    sizes: list[int]


class Sent(Message, frozen=True):
    """All bytes of a mirror were sent. ``whole``: it was not given up meanwhile; else they may be of two mirrors."""

    whole: bool


class Get(Message, frozen=True):
    """Send the mirrors that are kept of these ranks at this step, then Done."""

    ranks: list[int]
    step: int


class Done(Message, frozen=True):
    """To Put and Large: send the bytes, or they have been taken; to Get and Recall: these were all.

    ``reason``: why it cannot be taken, a sentence without its full stop; ``here``: it is kept already.
    """

    reason: str = ""
    here: bool = False


class Large(Message, frozen=True):
    """A Copy whose bytes follow, once Done has come, in this order; a second Done says that they have been taken.

    Attributes:
        copy: the rest of it.
        blob: bytes of its blob; ``parts``: of each of its parts; ``log``: of each entry.
    """

    copy: Copy
    blob: int
    parts: dict[int, int]
    log: list[int] | None

    @property
    def nbytes(self) -> int:
        """All bytes that follow."""
        return self.blob + sum(self.parts.values()) + sum(self.log or [])


class Recall(Message, frozen=True):
    """Send the copies that are kept of these ranks, then Done."""

    ranks: list[int]


OnBulk = Put | Sent | Get | Done | Large | Recall

_decoder: msgspec.msgpack.Decoder[OnBulk] = msgspec.msgpack.Decoder(OnBulk)


def decode_bulk(body: bytes) -> OnBulk:
    """The message in ``body``. Raises ProtocolError on anything else."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"An agent sent a message that cannot be read: {error}.") from error
