"""Messages between agents, encoded as those between a worker and its agent (see `messages`).

Up go what an agent's ranks have reached and what became of them; down go orders, which carry the term of the
coordinator that gave them. An agent and its *guardian* (the agent of the next seat) talk directly, see `guarding`.
"""

from __future__ import annotations

import msgspec

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.guarding import Bulk, Copy, Holds, Kept, Lacking, Ward
from checkpointless_elastic.protocol.hangs import Where
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Frozen,
    Hold,
    Left,
    Message,
    Mismatch,
    Protected,
    Rebuild,
    Release,
    Replicas,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.requests import (
    Declined,
    Dismissed,
    Drain,
    Drained,
    Inquiry,
    Leaving,
    Overview,
    Took,
    Warm,
)

VERSION = 4

Said = Protected | Left | Mismatch | Replicas
"""What one worker has to say to the coordinator."""


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """Where an agent with a seat stands: what a new coordinator must know of it.

    Attributes:
        since: the generation in which this agent got the seat.
        ran: the newest generation in which the job was seen to run.
        guardian: its address, as far as this agent knows; see Seated.
        step: the next step to be committed, as far as this agent knows.
        pending: its ranks that are replacements and have not joined.
        lost, left: of the recovery that goes on, empty if none does; see Freeze. ``left`` also has its ranks that have
            said so since.
        gone: its ranks whose worker is gone and not yet replaced.
        protected: its ranks whose script has made a Run.
        held: what its ranks hold, as they said after the first step.
        released: all ranks of the job have finished the script.
        ended: what NodeEnded says of this agent; None: not yet.
        resizes, kept: see Seated.
        keepers: its ranks whose state of step ``kept`` is on this node.
        unfit: of its ranks that cannot recover live, what they said.
    """

    seat: int
    generation: int
    since: int
    ran: int
    guardian: str
    step: int
    restarts: int
    pending: list[int]
    lost: list[int]
    left: list[int]
    gone: list[int]
    protected: list[int]
    held: dict[int, Replicas]
    released: bool
    ended: dict[int, int] | None = None
    resizes: int = 0
    kept: int = -1
    keepers: list[int] = []
    unfit: dict[int, str] = {}


# ---- to the coordinator ----------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """First message of an agent.

    Attributes:
        address: where it listens.
        size: how many workers it would run.
        standing: if it has a seat.
        nodes: seats of the job, if it knows them, see `layout`: a new coordinator may be new to the job.
    """

    version: int
    agent: str
    address: str
    size: int
    standing: Standing | None = None
    nodes: list[tuple[int, int]] = []


class Gathered(Message, frozen=True):
    """Ranks of this agent have reached a stage; by rank, what they have to say of it."""

    stage: Stage
    generation: int
    step: int
    reports: dict[int, bytes]


class Among(Message, frozen=True):
    """What ranks have committed among themselves, see `events.Counted`."""

    generation: int
    step: int


class Answers(Message, frozen=True):
    """What ranks of this agent answered to Freeze.

    ``mirrored``: by lost rank, the step of the newest mirror that this agent keeps for it.
    """

    generation: int
    reports: dict[int, Frozen]
    mirrored: dict[int, int] = {}


class RankStarted(Message, frozen=True):
    """A worker was forked."""

    rank: int
    pid: int


class RankGone(Message, frozen=True):
    """A worker is lost; see `events.Lost`."""

    rank: int
    cause: str
    error: str
    mirrored: int


class RankExited(Message, frozen=True):
    """A worker ended with code 0 without waiting for the others. ``finished``: of ranks that had waited for it."""

    rank: int
    finished: Gathered | None = None


class RankExplained(Message, frozen=True):
    """The exit status of a lost worker has come."""

    rank: int
    cause: str


class RankSays(Message, frozen=True):
    """A worker's word to the coordinator."""

    rank: int
    said: Said


class Halted(Message, frozen=True):
    """Some ranks of this agent are past their limits; where all of them are that can be looked at."""

    generation: int
    step: int
    ranks: dict[int, Where]


class Pace(Message, frozen=True):
    """From time to time: see `protocol.pace`. By rank, its own time and that of a whole step, in seconds."""

    ranks: dict[int, tuple[float, float]]


class NodeEnded(Message, frozen=True):
    """All workers of this agent have ended after the job was released, or one badly. ``bad``: exit codes but 0."""

    seat: int
    restarts: int
    bad: dict[int, int]


# ---- in the tree of many agents, see `branch` ------------------------------------------------------------------------


class Child(Message, frozen=True):
    """First message to a parent: the sender wants to hang on the receiver, under the coordinator of this term."""

    term: int
    agent: str


class Attached(Message, frozen=True):
    """To the coordinator: the sender hangs on the agent at this address."""

    parent: str


class Detached(Message, frozen=True):
    """To the coordinator: the connection to the parent at this address has ended."""

    parent: str


class Silent(Message, frozen=True):
    """To the coordinator: this agent hangs on the sender and gives no sign of life."""

    agent: str


class Bundle(Message, frozen=True):
    """Gathered of several agents. ``runs``: first rank, how many, and what each of them has to say."""

    stage: Stage
    generation: int
    step: int
    runs: list[tuple[int, int, bytes]]


class AnswerBundle(Message, frozen=True):
    """Answers of several agents; ``runs``: see Bundle."""

    generation: int
    runs: list[tuple[int, int, Frozen]]
    mirrored: dict[int, int] = {}


# ---- from the coordinator --------------------------------------------------------------------------------------------


class Seated(Message, frozen=True):
    """Run the workers of this seat.

    Attributes:
        bases: the first rank of each seat.
        world: number of ranks.
        store: "host:port" of the store in which workers meet.
        guardian: address of the agent of the next seat; empty if there is no other.
        taken: the seat of a lost agent: its ranks are replacements, their private state is with the guardian.
        restarts: how many times the script was run before; ``resizes``: how many of these were a change of the
            number of ranks, see `resize`.
        kept: the run goes on at this step with state that the last run left behind; -1: it begins anew.
        reason: why an agent that has a seat gets another one.
    """

    term: int
    seat: int
    bases: list[int]
    world: int
    store: str
    guardian: str
    generation: int
    restarts: int
    taken: bool
    resizes: int = 0
    kept: int = -1
    reason: str = ""


class Spare(Message, frozen=True):
    """Wait: no seat is free. ``bases`` and ``world``: see Seated; empty before the job has begun."""

    term: int
    bases: list[int]
    world: int


class Order(Message, frozen=True):
    """What all agents with a seat do, or pass on to their workers.

    ``number``: counts, in one term, those that go down the tree; 0: this one does not. ``dropped``: agents that have
    lost their seats since the job last ran, and may not know it; nobody passes orders on to them. A Decision goes
    without its ``sources``: they are all ranks that are not pending.
    """

    term: int
    message: Ordered
    number: int = 0
    dropped: list[str] = []


class Attach(Message, frozen=True):
    """Hang on the agent at this address; empty: on the coordinator."""

    parent: str


class Reseated(Message, frozen=True):
    """By seat, the address of its new agent."""

    addresses: dict[int, str]


class ReplaceRank(Message, frozen=True):
    """Start the next incarnation of this rank, whose worker is gone. ``store``: see Seated."""

    rank: int
    store: str


class EndRank(Message, frozen=True):
    """End this worker; its loss comes as any other. ``reason`` completes "rank 3 ..."; ``stuck``: it was late."""

    rank: int
    reason: str
    stuck: bool


class RollCall(Message, frozen=True):
    """A deadline has passed, and agents report for all their ranks together: which have come out of this state?

    Each answers by itself: Gathered of Stage.PRESENT, with ``number`` as its step; what an absent rank says is empty.
    """

    generation: int
    number: int
    state: str


class RunAgain(Message, frozen=True):
    """Run the script from its top, by rung 3 or 4; its workers meet in ``store``. ``kept``: see Seated."""

    generation: int
    restarts: int
    reason: str
    store: str
    rung: int = 4
    kept: int = -1


class Halt(Message, frozen=True):
    """The job has failed because of these ranks."""

    reason: str
    ranks: list[int]


class Done(Message, frozen=True):
    """The job has succeeded."""


class Turned(Message, frozen=True):
    """This agent may not take part. ``fenced``: its seat was given to another; it may come back as a new agent."""

    reason: str
    fenced: bool


# ---- both ways -------------------------------------------------------------------------------------------------------


class Beat(Message, frozen=True):
    """A sign of life. ``count``: of the coordinator's beats, as the directory has it; ``seat``: the sender's, or -1."""

    term: int
    count: int
    seat: int


Ordered = (
    Commit
    | Freeze
    | Hold
    | Decision
    | Restore
    | Rebuild
    | Resume
    | Release
    | Reseated
    | RollCall
    | RunAgain
    | Halt
    | Done
)

Between = (
    Join
    | Gathered
    | Among
    | Answers
    | RankStarted
    | RankGone
    | RankExited
    | RankExplained
    | RankSays
    | Halted
    | Pace
    | NodeEnded
    | Child
    | Attached
    | Detached
    | Silent
    | Bundle
    | AnswerBundle
    | Attach
    | Seated
    | Spare
    | Order
    | ReplaceRank
    | EndRank
    | Turned
    | Beat
    | Ward
    | Copy
    | Lacking
    | Kept
    | Holds
    | Bulk
    | Inquiry
    | Overview
    | Drain
    | Drained
    | Declined
    | Leaving
    | Dismissed
    | Took
    | Warm
)

_decoder: msgspec.msgpack.Decoder[Between] = msgspec.msgpack.Decoder(Between)


def decode(body: bytes | memoryview) -> Between:
    """The message in ``body`` (without its length). Raises ProtocolError on anything else."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"An agent sent a message that cannot be read: {error}.") from error
