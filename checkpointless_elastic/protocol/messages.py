"""Messages between workers, agents and the coordinator, and their encoding.

On a socket a message is a 4-byte little-endian length and a msgpack array whose first element names the type. Nothing
here is ever unpickled: msgspec checks names and types, and anything else is a ProtocolError.
"""

from __future__ import annotations

import enum
import struct

import msgspec

from checkpointless_elastic.errors import ProtocolError

VERSION = 5
MAX_MESSAGE = 64 << 20
_LENGTH = struct.Struct("<I")


class Phase(str, enum.Enum):
    """Where a worker stands in its step."""

    COMPUTING = "computing"
    READY = "ready"


class Stage(str, enum.Enum):
    """What ranks report together; the coordinator goes on when all expected ranks have."""

    READY = "ready"
    FROZEN = "frozen"
    PUBLISHED = "published"
    ARRIVED = "arrived"
    RESTORED = "restored"
    REBUILT = "rebuilt"
    FINISHED = "finished"
    PRESENT = "present"  # an agent's word on its ranks, see `between.RollCall`


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


# ---- worker to agent -------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message on each of a worker's two connections."""

    version: int
    rank: int
    incarnation: int
    token: str
    channel: str  # "control" or "vote"


class Protected(Message, frozen=True):
    """The script has made a Run: its state can be restored."""


class Report(Message, frozen=True):
    """A rank has reached a stage. ``payload`` is opaque to the protocol."""

    stage: Stage
    generation: int
    step: int
    payload: bytes = b""


class Frozen(Message, frozen=True):
    """Answer to Freeze: where this rank stands, and whether its state is whole (false in shadow)."""

    generation: int
    step: int
    phase: Phase
    whole: bool
    protected: bool


class Left(Message, frozen=True):
    """This rank does not issue the collectives that its peers may: it left its void attempt, or never began it."""

    generation: int


class Failed(Message, frozen=True):
    """The script ended with an exception that is its own, or with an exit code; then ``error`` is empty.

    The process ends later. Peers see its connections close before that, and must know why.
    """

    step: int
    error: str


class Mismatch(Message, frozen=True):
    """This rank cannot take part in a live recovery; the sentence says why. Rung 3 follows."""

    reason: str


class Replicas(Message, frozen=True):
    """After the first step: what this rank holds, and which ranks should hold the same bytes.

    ``claims``: sets of ranks, an empty one for all. ``pieces``: by key, the number of its claim and its digest.
    """

    claims: list[list[int]]
    pieces: dict[str, tuple[int, int]]


class Explained(Message, frozen=True):
    """Answer to Explain: where the main thread is.

    ``at``: the innermost line of the script; ``waits``: for a collective; ``compiles``: torch.compile does.
    """

    at: str
    waits: bool
    compiles: bool


class Mirrored(Message, frozen=True):
    """A mirror of this rank is whole, of this step and begun in this generation; it is the newest one that counts.

    Comes before the report that the rank is ready for that step, on the same connection. Step -1: there is none.
    """

    step: int
    generation: int


class Unhealthy(Message, frozen=True):
    """In a replacement, before it joins: the device that it has does not work; the sentence says why."""

    reason: str


class Learned(Message, frozen=True):
    """Third-party modules that the script imported: worth loading in the fork server."""

    modules: list[str]


class Unwound(Message, frozen=True):
    """Answer to Unwind: this worker is out of the script and left nothing of it; it waits for Again."""


class Afresh(Message, frozen=True):
    """The script failed in a process that had run it before, and has met no peer: end this one, run it in a new one."""

    error: str


# ---- agent to worker -------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """The connection is accepted. ``shadow``: this worker is a replacement and contacts no peer until it joins.

    ``mirror_every``: of which steps it keeps mirrors, see `protocol.mirrors`. ``bases``: the lowest rank of each node;
    a node's ranks follow each other. ``store``: as in Decision, for what the script of a replacement does before one.
    ``verify_every``: at which steps it says what its state is, see `protocol.checks`. ``returns``: the run goes on with
    the state of the last one: before its first loop or replayable call, this worker waits for a Decision and takes it.
    """

    generation: int
    shadow: bool
    mirror_every: int = 0
    bases: tuple[int, ...] = (0,)
    store: str = ""
    verify_every: int = 0
    returns: bool = False


class Refused(Message, frozen=True):
    """The connection is not accepted; the sentence says why."""

    reason: str


class Commit(Message, frozen=True):
    """Every rank was ready for ``step``: apply the update."""

    generation: int
    step: int


class Freeze(Message, frozen=True):
    """Generation ``generation`` is open. ``lost``: ranks lost since the job last ran; ``left``: see Left.

    ``store_lost``: the store of the generation before is lost too; groups that wait in it for their next use are void.
    """

    generation: int
    lost: list[int]
    left: list[int]
    store_lost: bool = False


class Hold(Message, frozen=True):
    """A node seems lost while this generation is in force, which is not confirmed yet: Freeze or Unwind follows.

    The store may take its time to confirm it, or to name another coordinator. Until then no collective that fails is
    taken for the script's own error. The agent has the limit.
    """

    generation: int


class Explain(Message, frozen=True):
    """The job has come to a halt: say where the main thread is."""


class Decision(Message, frozen=True):
    """All ranks go on at ``step``. A rank that is ready for ``step - 1`` applies it first.

    ``store``: "host:port" of the TCPStore in which workers meet from now on; empty: that of MASTER_ADDR, MASTER_PORT.
    ``mirrors``: pending ranks that go on from their mirrors of that step.
    ``resizes``: the script is run again, by another number of ranks: the sources leave their state behind for it.
    """

    generation: int
    step: int
    sources: list[int]
    pending: list[int]
    store: str = ""
    mirrors: list[int] = []
    resizes: bool = False


class Restore(Message, frozen=True):
    """What the sources published, by rank; replacements copy it now."""

    generation: int
    publications: dict[int, bytes]


class Rebuild(Message, frozen=True):
    """Rebuild the affected groups under this generation's store prefix. ``affected``: ranks lost or left early."""

    generation: int
    affected: list[int]


class Resume(Message, frozen=True):
    """Every rank is whole and connected: compute."""

    generation: int


class Release(Message, frozen=True):
    """Every rank has finished its script: exit."""

    generation: int


class Unwind(Message, frozen=True):
    """The script is run again: leave it now, wherever it is."""


class Again(Message, frozen=True):
    """Run the script from its top with this environment and these log files; see `SpawnRequest`."""

    env: dict[str, str]
    stdout: str
    stderr: str


FromWorker = (
    Hello
    | Protected
    | Report
    | Frozen
    | Left
    | Failed
    | Mismatch
    | Explained
    | Mirrored
    | Unhealthy
    | Learned
    | Replicas
    | Unwound
    | Afresh
)
ToWorker = (
    Welcome
    | Refused
    | Commit
    | Freeze
    | Hold
    | Explain
    | Decision
    | Restore
    | Rebuild
    | Resume
    | Release
    | Unwind
    | Again
)

_encoder = msgspec.msgpack.Encoder()
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def encode_body(message: Message) -> bytes:
    """One message without its length."""
    return _encoder.encode(message)


def encode(message: Message) -> bytes:
    """One message with its length in front, as it goes on a socket."""
    body = encode_body(message)
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(
            f"A {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_MESSAGE}."
        )
    return _LENGTH.pack(len(body)) + body


def decode_from_worker(body: bytes | memoryview) -> FromWorker:
    """The message in ``body`` (without its length). Raises ProtocolError on anything else."""
    try:
        return _from_worker.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A worker sent a message that cannot be read: {error}.") from error


def decode_to_worker(body: bytes | memoryview) -> ToWorker:
    """The message in ``body`` (without its length). Raises ProtocolError on anything else."""
    try:
        return _to_worker.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"The agent sent a message that cannot be read: {error}.") from error


class Frames:
    """Cuts a byte stream into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Has a part of a message come?"""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete now. Raises ProtocolError when a length is over the limit."""
        if (
            not self._buffer
            and len(data) >= _LENGTH.size
            and len(data) == _LENGTH.size + _LENGTH.unpack_from(data)[0]
        ):
            return [data[_LENGTH.size :]]  # one whole message, the usual case
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_MESSAGE:
                raise ProtocolError(
                    f"A peer announced a message of {length} bytes; the limit is {MAX_MESSAGE}."
                )
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies
