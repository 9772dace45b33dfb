"""The handshake between two agents: bytes in, bytes out, no socket and no clock.

Every handshake message is a header (magic, version, length) and a msgpack array. The header and `Refusal` have the same
layout in all versions, so that an agent of another version is told why it is refused.

    initiator                                     acceptor
    Greeting(job, agent, nonce)     ------->
                                    <-------      Challenge(agent, nonce)
    Proof(mac as initiator)         ------->
                                    <-------      Proof(mac as acceptor)

A proof is HMAC-SHA256 under the job's token over role, version, job, both agents and both nonces: the token itself is
never sent, an old proof is of no use with a new nonce, and one's own proof sent back is that of the wrong role. The
initiator proves itself first: a listening agent gives nothing that depends on the token to whoever just connects. The
job is sent as a digest, since a token may be derived from its id.

What follows is neither signed nor encrypted: on a network that others can write to, use TLS.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import secrets
import struct
from dataclasses import dataclass, field

import msgspec

from checkpointless_elastic.agent.credentials import Tls
from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.messages import VERSION

__all__ = ["HEADER_SIZE", "MAGIC", "MAX_HANDSHAKE", "Handshake", "Identity", "NotAccepted", "Role", "refusal"]

MAGIC = b"\x89CKPTLES"  # the first byte is in no text
MAX_HANDSHAKE = 4096  # bytes of one message, without its header
_HEADER = struct.Struct("<8sHI")
HEADER_SIZE = _HEADER.size
_NONCE_BYTES = 32
_MAX_AGENT = 256  # characters
_MAX_REASON = 300
_HTTP = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"HTTP/", b"OPTIONS ", b"CONNECT ", b"DELETE ", b"PRI * ")
_TLS_RECORD = b"\x16\x03"


class Role(enum.Enum):
    """Who connected, and who was connected to."""

    INITIATOR = b"initiator"
    ACCEPTOR = b"acceptor"


@dataclass(frozen=True)
class Identity:
    """Who an agent is.

    Attributes:
        job: the job's id; agents of another job are refused.
        agent: unique id of this agent's life; another one after each start.
        token: what the agents of a job have in common and nobody else knows.
        tls: files for TLS; None for plain connections.
    """

    job: str
    agent: str
    token: bytes = field(repr=False)
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if not _is_name(self.agent):
            raise ValueError(f"An agent's id has 1 to {_MAX_AGENT} printable characters, not {self.agent!r}.")
        if not self.token:
            raise ValueError("The token of a job must not be empty.")

    def digest(self) -> bytes:
        """What is sent in place of the job's id."""
        return hashlib.sha256(b"checkpointless job\0" + os.fsencode(self.job)).digest()


class NotAccepted(ProtocolError):
    """Raised when the other side is not, or may not be, a peer.

    Attributes:
        reason: part of a sentence, about the other side.
        answer: bytes to send before the connection is closed, so that the other side knows too.
    """

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


class Greeting(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """First message of the initiator."""

    job: bytes
    agent: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The acceptor's answer to a greeting."""

    agent: str
    nonce: bytes


class Proof(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Its sender knows the token."""

    mac: bytes


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The connection is not accepted; may come at any time before the end of the handshake."""

    reason: str


_Step = Greeting | Challenge | Proof | Refusal
_decoder: msgspec.msgpack.Decoder[_Step] = msgspec.msgpack.Decoder(_Step)


def refusal(reason: str) -> bytes:
    """A refusal as it goes on the wire."""
    return _pack(Refusal(reason[:_MAX_REASON]))


def described(data: bytes) -> str:
    """What the first bytes of something that is not this protocol look like, as part of a sentence."""
    if data.startswith(_TLS_RECORD):
        return "it speaks TLS and this agent does not; give all agents of the job the same TLS settings"
    if data.startswith(_HTTP):
        return "it speaks HTTP"
    if all(32 <= byte < 127 or byte in b"\r\n\t" for byte in data[:16]):
        return f"it sent text that is not of this protocol ({data[:16]!r})"
    return f"it sent bytes that are not of this protocol ({data[:16]!r})"


def without_tls(data: bytes) -> NotAccepted:
    """The error for a peer whose first bytes, `data`, are not TLS although this agent's are."""
    reason = "it speaks without TLS and this agent does not; give all agents of the job the same TLS settings"
    if not data.startswith(MAGIC[: len(data)]):
        return NotAccepted(described(data))
    try:
        _cut(data)  # raises if it is a refusal
    except NotAccepted as error:
        if not error.answer:
            return error
    return NotAccepted(reason, refusal("this agent requires TLS; give all agents the same TLS settings"))


class Handshake:
    """One side of one handshake.

    Attributes:
        started: `start` was called.
        done: both sides are who they should be.
        agent: the other side's id, once `done`.
        rest: bytes that came after the handshake, once `done`.
    """

    def __init__(self, identity: Identity, role: Role) -> None:
        self.started = False
        self.done = False
        self.agent = ""
        self.rest = b""
        self._identity = identity
        self._role = role
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._theirs = b""
        self._claimed = ""
        self._buffer = b""

    def start(self) -> bytes:
        """What is to be sent first; nothing for the acceptor."""
        self.started = True
        if self._role is Role.ACCEPTOR:
            return b""
        return _pack(Greeting(self._identity.digest(), self._identity.agent, self._nonce))

    def feed(self, data: bytes) -> bytes:
        """Take received bytes and return what is to be sent. Raises NotAccepted; then nothing more may be fed."""
        self._buffer += data
        step, rest = _cut(self._buffer)
        if step is None:
            return b""
        self._buffer = b""
        answer = self._take(step)
        if rest and not (self.done and self._role is Role.INITIATOR):
            raise NotAccepted("it sent more than one message at a time in the handshake")
        self.rest = rest
        return answer

    def _take(self, step: _Step) -> bytes:
        if isinstance(step, Proof) and self._claimed:
            return self._verify(step)
        if isinstance(step, Greeting) and self._role is Role.ACCEPTOR and not self._claimed:
            return self._challenge(step)
        if isinstance(step, Challenge) and self._role is Role.INITIATOR and not self._claimed:
            self._check_peer(step.agent, step.nonce)
            return _pack(Proof(self._mac(Role.INITIATOR)))
        raise NotAccepted(
            f"it sent a {type(step).__name__} out of turn", refusal("a message came out of turn")
        )

    def _challenge(self, step: Greeting) -> bytes:
        if not hmac.compare_digest(step.job, self._identity.digest()):
            raise NotAccepted(
                f"it belongs to another job than {self._identity.job!r}",
                refusal("this agent belongs to another job; compare --rdzv-id"),
            )
        self._check_peer(step.agent, step.nonce)
        return _pack(Challenge(self._identity.agent, self._nonce))

    def _check_peer(self, agent: str, nonce: bytes) -> None:
        if not _is_name(agent) or len(nonce) != _NONCE_BYTES:
            raise NotAccepted("its id or nonce is malformed", refusal("the id or nonce is malformed"))
        if agent == self._identity.agent or hmac.compare_digest(nonce, self._nonce):
            raise NotAccepted(
                "it is this agent itself, or sends back what it got", refusal("it is the same agent")
            )
        self._claimed, self._theirs = agent, nonce

    def _verify(self, step: Proof) -> bytes:
        other = Role.ACCEPTOR if self._role is Role.INITIATOR else Role.INITIATOR
        if not hmac.compare_digest(step.mac, self._mac(other)):
            raise NotAccepted("it does not know this job's token", refusal("the job tokens differ"))
        self.done, self.agent = True, self._claimed
        return _pack(Proof(self._mac(Role.ACCEPTOR))) if self._role is Role.ACCEPTOR else b""

    def _mac(self, role: Role) -> bytes:
        """The proof of the side with this role."""
        us, them = (self._identity.agent.encode(), self._nonce), (self._claimed.encode(), self._theirs)
        initiator, acceptor = (us, them) if self._role is Role.INITIATOR else (them, us)
        parts = (
            b"checkpointless peers",
            role.value,
            VERSION.to_bytes(2, "little"),
            self._identity.digest(),
            *initiator,
            *acceptor,
        )
        signed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        return hmac.digest(self._identity.token, signed, "sha256")


def _pack(step: _Step) -> bytes:
    body = msgspec.msgpack.encode(step)
    return _HEADER.pack(MAGIC, VERSION, len(body)) + body


def _cut(data: bytes) -> tuple[_Step | None, bytes]:
    """The first message in `data`, None if it is not complete, and what follows. Raises NotAccepted."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise NotAccepted(described(data), refusal("this agent speaks without TLS") if _is_tls(data) else b"")
    if len(data) < _HEADER.size:
        return None, b""
    _, version, length = _HEADER.unpack_from(data)
    end = _HEADER.size + length
    if length <= MAX_HANDSHAKE and len(data) < end:
        return None, b""
    try:
        step = _decode(data[_HEADER.size : end], length)
    except NotAccepted:
        if version == VERSION:
            raise
        step = None
    if isinstance(step, Refusal):
        raise NotAccepted(f"it refused this agent: {_printable(step.reason)}")
    if step is None or version != VERSION:
        reason = f"it speaks version {version} of the agents' protocol, this agent version {VERSION}"
        raise NotAccepted(reason, refusal(f"this agent speaks version {VERSION}, the other one {version}"))
    return step, data[end:]


def _decode(body: bytes, length: int) -> _Step:
    """The message of a body of which `length` bytes were announced."""
    if length > MAX_HANDSHAKE:
        raise NotAccepted(
            f"it announced a handshake message of {length} bytes, at most {MAX_HANDSHAKE} are allowed"
        )
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotAccepted(
            f"it sent a handshake message that cannot be read ({_printable(str(error))})"
        ) from error


def _is_tls(data: bytes) -> bool:
    return data.startswith(_TLS_RECORD)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _MAX_AGENT and text.isprintable()


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:_MAX_REASON])
