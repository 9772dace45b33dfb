"""What a client of the job asks the coordinator, and what agents say when one of them leaves.

A client is no agent: it has no seat, is not counted and nobody waits for it. It connects, asks, and is answered.
"""

from __future__ import annotations

import msgspec

from checkpointless_elastic.protocol.messages import Message

__all__ = [
    "Declined",
    "Dismissed",
    "Drain",
    "Drained",
    "Inquiry",
    "Leaving",
    "Overview",
    "Place",
    "Took",
    "Warm",
]


class Place(msgspec.Struct, frozen=True, array_like=True):
    """One agent: its seat (-1: a spare), its name, where it listens, and how many workers it runs.

    ``parent``: the seat that it hangs on in the tree of many agents, see `branch`; -1: on the coordinator.
    """

    seat: int
    agent: str
    address: str
    size: int
    parent: int = -1


# ---- of a client -----------------------------------------------------------------------------------------------------


class Inquiry(Message, frozen=True):
    """How is the job? Answered by Overview, or Declined."""


class Overview(Message, frozen=True):
    """How the job is.

    Attributes:
        term, coordinator: of the coordinator, its agent's name.
        state: of the coordinator (see `coordinator.State`), or gathering or "taking over" before it decides.
        step: the one that is committed next.
        bases, world: see Seated; empty before the job has begun.
        agents: all that take part; a seat that none of them has is vacant.
        pending: ranks that are replacements and have not joined yet.
        slow: by rank, seconds by which its own part of a step takes longer than that of others, see `protocol.pace`.
        wanted: nodes that would get workers, if so many were there; 0: before the job has begun.
        resizes: how often the number of ranks was changed.
        exposed: why the loss of a rank would run the script again from its top; empty: it would not.
    """

    term: int
    coordinator: str
    state: str
    generation: int
    step: int
    restarts: int
    bases: list[int]
    world: int
    agents: list[Place]
    pending: list[int]
    exposed: str
    slow: dict[int, float]
    wanted: int = 0
    resizes: int = 0


class Drain(Message, frozen=True):
    """Move the ranks of this agent, which has this seat, to a spare; without one the job shrinks, if it may.

    Answered by Drained, or Declined.

    Attributes:
        seat: -1 for an agent that waits as a spare: it leaves.
        keep: the agent stays, as a spare.
    """

    seat: int
    agent: str
    keep: bool


class Drained(Message, frozen=True):
    """It has begun."""


class Declined(Message, frozen=True):
    """Nothing was done. ``again``: what stands in the way passes by itself."""

    reason: str
    again: bool


# ---- of agents -------------------------------------------------------------------------------------------------------


class Leaving(Message, frozen=True):
    """This agent ends its part in the job now: said to the coordinator, or by it to all.

    ``cause`` completes "node 3 ...".
    """

    agent: str
    cause: str


class Dismissed(Message, frozen=True):
    """To an agent: end the workers and leave the job; nothing went wrong. ``cause`` completes "this node ..."."""

    cause: str


class Took(Message, frozen=True):
    """This agent has taken the seat of this generation; what it said before was about ranks with other numbers."""

    generation: int


class Warm(Message, frozen=True):
    """This agent has no seat, and could start workers at once."""
