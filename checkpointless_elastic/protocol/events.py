"""What the coordinator is told (events) and what it wants done (actions)."""

from __future__ import annotations

from dataclasses import dataclass, field

from checkpointless_elastic.protocol.hangs import Where
from checkpointless_elastic.protocol.messages import Frozen, Message, Stage


class Event:
    """Base of all events."""


@dataclass(frozen=True)
class Tally(Event):
    """Some ranks, all of one agent or subtree, have reached a stage. ``reports``: rank to payload."""

    stage: Stage
    generation: int
    step: int
    reports: dict[int, bytes]


@dataclass(frozen=True)
class Counted(Event):
    """All ranks of the job are of one agent, and have committed the steps below ``step`` among themselves.

    ``generation``: in which they ran.
    """

    generation: int
    step: int


@dataclass(frozen=True)
class AllFrozen(Event):
    """Answers to Freeze of some ranks, all of one agent or subtree. ``mirrored``: see `between.Answers`."""

    generation: int
    reports: dict[int, Frozen]
    mirrored: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost(Event):
    """A worker is gone. ``cause`` completes "rank 3 ..."; ``error``: its own exception, if that is why.

    ``mirrored``: the newest step of which it left a whole mirror, -1 without one.
    """

    rank: int
    cause: str
    error: str = ""
    mirrored: int = -1


@dataclass(frozen=True)
class NodeLost(Event):
    """A node is gone with these workers; they come back on another one. ``cause`` completes "node 3 ..."."""

    node: int
    ranks: frozenset[int]
    cause: str


@dataclass(frozen=True)
class Reopened(Event):
    """The coordinator is another one, and no rank was lost with the old one."""

    cause: str


@dataclass(frozen=True)
class Resize(Event):
    """The job is to go on with another number of ranks; ``cause``: why, a sentence without its full stop."""

    cause: str


@dataclass(frozen=True)
class ExitedEarly(Event):
    """A worker ended with code 0 outside its loops without waiting for the others."""

    rank: int


@dataclass(frozen=True)
class LeftEarly(Event):
    """A survivor left its void attempt through an exception, or recovers before it began the one others are in."""

    rank: int
    generation: int


@dataclass(frozen=True)
class Unfit(Event):
    """A rank cannot take part in a live recovery; the sentence says why."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Late(Event):
    """Ranks of one agent, of which some are past their limits, and what they are doing."""

    generation: int
    step: int
    ranks: dict[int, Where]


@dataclass(frozen=True)
class Overdue(Event):
    """A deadline that the coordinator asked for has passed."""

    generation: int
    state: str


class Action:
    """Base of all actions."""


@dataclass(frozen=True)
class Broadcast(Action):
    """Send to every worker of the job."""

    message: Message


@dataclass(frozen=True)
class Replace(Action):
    """Fork the next incarnation of this rank at once."""

    rank: int


@dataclass(frozen=True)
class End(Action):
    """End this worker, whose loss then comes as any other.

    ``reason`` completes "rank 3 ..."; ``stuck``: seconds for which it was.
    """

    rank: int
    reason: str
    stuck: float = 0.0


@dataclass(frozen=True)
class Restart(Action):
    """The script runs from its top: in the surviving processes (rung 3) or new ones (4). Counts as a restart."""

    rung: int
    reason: str


@dataclass(frozen=True)
class Stop(Action):
    """The job has failed because of these ranks."""

    reason: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Kept(Action):
    """The sources have left the state of this step behind: the script can be run again by others with it."""

    step: int
    keepers: frozenset[int]


@dataclass(frozen=True)
class Warn(Action):
    """Something that people should know; no answer is needed."""

    sentence: str


@dataclass(frozen=True)
class Succeed(Action):
    """Every rank has finished."""


@dataclass(frozen=True)
class Deadline(Action):
    """Come back with Overdue(generation, state) unless the state was left; which limit applies is named.

    A further one replaces it.
    """

    generation: int
    state: str
    limit: str  # a name in Config


@dataclass(frozen=True)
class Chosen(Action):
    """Rung 1 or 2 was chosen (for the log and the timeline); see `rungs.Choice`.

    ``what`` has happened when step ``step`` was to be committed next. ``ends``: survivors that are ended for it.
    """

    generation: int
    step: int
    what: str
    rung: int
    reason: str
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Opened(Action):
    """A generation was opened (for the timeline)."""

    generation: int
    lost: frozenset[int]
    cause: str


@dataclass(frozen=True)
class Resized(Action):
    """The script is run again by another number of ranks, with its state (for the log and the timeline)."""

    generation: int
    step: int
    reason: str
    before: int
    after: int


@dataclass(frozen=True)
class Reached(Action):
    """A recovery has reached a point (for the timeline): frozen, published, arrived, restored, resumed, committed."""

    generation: int
    point: str
    details: dict[str, object] = field(default_factory=dict)
