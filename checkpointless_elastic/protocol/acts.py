"""What an agent's part of the protocol wants done: on its connections, in the directory, with its workers."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from checkpointless_elastic.protocol.between import Between, EndRank, Ordered, ReplaceRank, Seated, Spare
from checkpointless_elastic.protocol.events import Action
from checkpointless_elastic.protocol.requests import Dismissed

__all__ = [
    "Act",
    "Ask",
    "Dial",
    "Fail",
    "Guard",
    "HangUp",
    "Heard",
    "Obey",
    "Perform",
    "Query",
    "Restarting",
    "Tell",
    "Transmit",
    "Word",
    "Yield",
]


Word = Ordered | Seated | Spare | ReplaceRank | EndRank | Dismissed
"""What the coordinator has to say to an agent."""


class Act:
    """Base of all."""


# ---- of the board, carried out by the member -------------------------------------------------------------------------


@dataclass(frozen=True)
class Tell(Act):
    """A message to an agent, by name."""

    agent: str
    message: Between


@dataclass(frozen=True)
class Guard(Act):
    """Have the directory confirm that this term is the newest, then come back with `Board.confirmed`."""


# ---- of the member, carried out by its agent -------------------------------------------------------------------------


class Query(enum.Enum):
    """What the directory is asked; the answer comes as one call of the member."""

    NEWEST = "newest"
    CLAIM = "claim"
    BEAT = "beat"
    GUARD = "guard"  # the same as BEAT
    LAST_BEAT = "last beat"
    END = "end"


@dataclass(frozen=True)
class Ask(Act):
    """``term`` and ``count`` as the query needs them; ``verdict`` with END."""

    query: Query
    term: int = 0
    count: int = 0
    verdict: str = ""


@dataclass(frozen=True)
class Dial(Act):
    """Connect; `opened` or `closed` follows."""

    link: int
    address: str


@dataclass(frozen=True)
class Transmit(Act):
    """Send on a connection."""

    link: int
    message: Between


@dataclass(frozen=True)
class HangUp(Act):
    """Close a connection; nothing more is heard of it."""

    link: int
    reason: str


@dataclass(frozen=True)
class Obey(Act):
    """The coordinator's word to this agent."""

    message: Word


@dataclass(frozen=True)
class Perform(Act):
    """For the coordinator's own agent: a deadline to keep, or a point for the timeline."""

    action: Action


@dataclass(frozen=True)
class Heard(Act):
    """For the timeline of the coordinator's own agent: a message of some agent."""

    message: Between


@dataclass(frozen=True)
class Yield(Act):
    """This agent's seat is another's: end the workers at once."""

    reason: str


@dataclass(frozen=True)
class Fail(Act):
    """This agent cannot take part any more."""

    reason: str


@dataclass(frozen=True)
class Restarting(Action):
    """The script is run again from its top (for the timeline)."""

    rung: int
    reason: str
    generation: int
    step: int
