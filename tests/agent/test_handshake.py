"""The handshake as bytes: who is accepted, who is not, and what goes over the wire."""

from __future__ import annotations

import random
import struct

import msgspec
import pytest

from checkpointless_elastic.agent.handshake import (
    HEADER_SIZE,
    MAGIC,
    MAX_HANDSHAKE,
    Handshake,
    Identity,
    NotAccepted,
    Role,
    refusal,
)
from checkpointless_elastic.protocol.messages import VERSION
from tests.agent.meeting import TOKEN, identity

HEADER = struct.Struct("<8sHI")


def sides(one: Identity | None = None, two: Identity | None = None) -> tuple[Handshake, Handshake]:
    """An initiator and an acceptor."""
    return Handshake(one or identity(), Role.INITIATOR), Handshake(two or identity(), Role.ACCEPTOR)


def talk(initiator: Handshake, acceptor: Handshake) -> list[bytes]:
    """Let them talk to the end; all that went over the wire."""
    wire = [initiator.start()]
    for side in (acceptor, initiator, acceptor, initiator):
        wire.append(side.feed(wire[-1]))
    return wire[:-1]


def packed(*fields: object, version: int = VERSION) -> bytes:
    """A handshake message with these fields."""
    body = msgspec.msgpack.encode(fields)
    return HEADER.pack(MAGIC, version, len(body)) + body


def greeting(who: Identity, **changes: object) -> bytes:
    fields = {"job": who.digest(), "agent": who.agent, "nonce": b"n" * 32, **changes}
    return packed("Greeting", *fields.values())


def refused(side: Handshake, data: bytes) -> NotAccepted:
    with pytest.raises(NotAccepted) as caught:
        side.feed(data)
    assert not side.done
    return caught.value


def test_both_sides_know_each_other_at_the_end() -> None:
    one, two = identity(), identity()
    initiator, acceptor = sides(one, two)
    talk(initiator, acceptor)
    assert (initiator.done, initiator.agent) == (True, two.agent)
    assert (acceptor.done, acceptor.agent) == (True, one.agent)


def test_neither_the_token_nor_the_jobs_id_goes_over_the_wire() -> None:
    wire = b"".join(talk(*sides(identity(job="secret-job"), identity(job="secret-job"))))
    assert TOKEN not in wire
    assert b"secret-job" not in wire


def test_the_token_is_not_in_the_repr() -> None:
    assert "token" not in repr(identity())


def test_the_acceptor_gives_nothing_that_depends_on_the_token_to_who_has_not_proven_itself() -> None:
    who, stranger = identity(), identity()
    answers = []
    for token in (b"one token of this job", b"another token of this job"):
        acceptor = Handshake(identity(agent=who.agent, token=token), Role.ACCEPTOR)
        acceptor._nonce = b"0" * 32
        answers.append(acceptor.feed(greeting(stranger)))
    assert answers[0] == answers[1]


def test_an_initiator_with_another_token_is_refused_and_told() -> None:
    initiator, acceptor = sides(identity(token=b"another token"))
    proof = initiator.feed(acceptor.feed(initiator.start()))
    error = refused(acceptor, proof)
    assert "does not know this job's token" in error.reason
    assert "refused this agent: the job tokens differ" in refused(initiator, error.answer).reason


def test_an_acceptor_that_does_not_know_the_token_is_refused() -> None:
    initiator, rogue = sides(two=identity(token=b"another token"))
    initiator.feed(rogue.feed(initiator.start()))
    proof = packed("Proof", rogue._mac(Role.ACCEPTOR))
    assert "does not know this job's token" in refused(initiator, proof).reason


def test_another_job_is_refused_and_told() -> None:
    initiator, acceptor = sides(identity(job="other"))
    error = refused(acceptor, initiator.start())
    assert "another job than 'job'" in error.reason
    assert "this agent belongs to another job" in refused(initiator, error.answer).reason


@pytest.mark.parametrize("version", [0, VERSION + 1, 65535])
def test_another_version_is_refused_and_told_whatever_its_messages_look_like(version: int) -> None:
    for data in (packed("Hi", 1, version=version), HEADER.pack(MAGIC, version, 1 << 30)):
        initiator, acceptor = sides()
        error = refused(acceptor, data)
        assert (
            f"it speaks version {version} of the agents' protocol, this agent version {VERSION}"
            in error.reason
        )
        initiator.start()
        assert f"this agent speaks version {VERSION}" in refused(initiator, error.answer).reason


def test_a_refusal_of_another_version_is_understood() -> None:
    reason = refused(sides()[0], packed("Refusal", "too old", version=VERSION + 3)).reason
    assert reason == "it refused this agent: too old"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it sent text that is not of this protocol \\(b'SSH-2.0-OpenSSH"),
        (b"x", "it sent text"),
        (b"\x16\x03\x01\x02\x00\x01\x00", "it speaks TLS and this agent does not"),
        (bytes(range(128, 200)), "it sent bytes that are not of this protocol"),
        (b"\x89PNG\r\n\x1a\n", "it sent bytes that are not"),
        (
            HEADER.pack(MAGIC, VERSION, MAX_HANDSHAKE + 1),
            f"{MAX_HANDSHAKE + 1} bytes, at most {MAX_HANDSHAKE}",
        ),
        (HEADER.pack(MAGIC, VERSION, 3) + b"abc", "a handshake message that cannot be read"),
        (packed("Greeting", b"j", "a"), "a handshake message that cannot be read"),
        (packed("Greeting", b"j", "a", b"n", 4), "a handshake message that cannot be read"),
        (packed("Hello", 1, 2, 3, "t", "control"), "a handshake message that cannot be read"),
        (packed("Proof", b"m" * 32), "a Proof out of turn"),
        (packed("Challenge", "a", b"n" * 32), "a Challenge out of turn"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_what_is_not_a_handshake_is_told_apart(data: bytes, what: str) -> None:
    with pytest.raises(NotAccepted, match=what):
        sides()[1].feed(data)


def test_deeply_nested_garbage_is_refused() -> None:
    body = b"\x94\xa8Greeting\xc4\x00\xa1a" + b"\x91" * 4000
    reason = refused(sides()[1], HEADER.pack(MAGIC, VERSION, len(body)) + body).reason
    assert "cannot be read" in reason


@pytest.mark.parametrize("agent", ["", "x" * 257, "two\nlines", "\x1b[31m"])
def test_a_malformed_id_is_refused(agent: str) -> None:
    assert "malformed" in refused(sides()[1], greeting(identity(), agent=agent)).reason
    with pytest.raises(ValueError, match="printable"):
        identity(agent=agent)


@pytest.mark.parametrize("nonce", [b"", b"n" * 31, b"n" * 33])
def test_a_nonce_of_another_length_is_refused(nonce: bytes) -> None:
    assert "malformed" in refused(sides()[1], greeting(identity(), nonce=nonce)).reason


def test_ones_own_greeting_sent_back_is_refused() -> None:
    initiator, _ = sides()
    assert "a Greeting out of turn" in refused(initiator, initiator.start()).reason
    who = identity()
    assert (
        "this agent itself"
        in refused(Handshake(who, Role.ACCEPTOR), Handshake(who, Role.INITIATOR).start()).reason
    )


def test_ones_own_nonce_and_proof_sent_back_are_refused() -> None:
    initiator, _ = sides()
    initiator.start()
    assert "sends back" in refused(initiator, packed("Challenge", "someone", initiator._nonce)).reason
    initiator, _ = sides()
    initiator.start()
    proof = initiator.feed(packed("Challenge", "someone", b"n" * 32))
    assert "does not know" in refused(initiator, proof).reason


def test_a_recorded_handshake_is_of_no_use_again() -> None:
    one, two = identity(), identity()
    wire = talk(*sides(one, two))
    acceptor = Handshake(two, Role.ACCEPTOR)
    assert acceptor.feed(wire[0])
    assert "does not know" in refused(acceptor, wire[2]).reason
    initiator = Handshake(one, Role.INITIATOR)
    initiator.start()
    assert initiator.feed(wire[1])
    assert "does not know" in refused(initiator, wire[3]).reason


def test_a_proof_for_one_agent_is_of_no_use_with_another_one() -> None:
    """An agent in the middle passes messages on between one and two, but says that it is three."""
    one, two, three = identity(), identity(), identity()
    initiator, acceptor = sides(one, two)
    middle = Handshake(three, Role.ACCEPTOR)
    initiator.start()
    challenge = acceptor.feed(greeting(three, nonce=initiator._nonce))
    middle._nonce = acceptor._nonce
    assert challenge
    middle_challenge = middle.feed(greeting(one, nonce=initiator._nonce))
    assert "does not know" in refused(acceptor, initiator.feed(middle_challenge)).reason


def test_a_handshake_that_comes_byte_by_byte_is_accepted() -> None:
    initiator, acceptor = sides()
    data = initiator.start()
    for side in (acceptor, initiator, acceptor, initiator):
        data = b"".join(side.feed(data[index : index + 1]) for index in range(len(data)))
    assert initiator.done and acceptor.done


def test_a_truncated_handshake_is_not_done() -> None:
    for cut in range(HEADER_SIZE + 20):
        initiator, acceptor = sides()
        assert acceptor.feed(initiator.start()[:cut]) == b""
        assert not acceptor.done


def test_bytes_after_the_handshake_belong_to_the_messages() -> None:
    initiator, acceptor = sides()
    wire = [initiator.start()]
    for side in (acceptor, initiator, acceptor):
        wire.append(side.feed(wire[-1]))
    initiator.feed(wire[-1] + b"\x01\x00\x00\x00x")
    assert initiator.done
    assert initiator.rest == b"\x01\x00\x00\x00x"


def test_nobody_may_send_ahead_of_the_handshake() -> None:
    initiator, acceptor = sides()
    assert "more than one message" in refused(acceptor, initiator.start() + b"x").reason


def test_the_reason_of_a_refusal_cannot_forge_log_lines() -> None:
    reason = refused(sides()[0], refusal("no\nERROR all is lost\x1b[2J")).reason
    assert reason == "it refused this agent: no?ERROR all is lost?[2J"


def mutated(data: bytes, random: random.Random) -> bytes:
    """The bytes with one to three changes: flipped, cut out, doubled or put in."""
    made = bytearray(data)
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(made) + 1)
        kind = random.randrange(4)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            del made[place : place + random.randint(1, 8)]
        elif kind == 2:
            made[place:place] = made[place : place + random.randint(1, 40)]
        else:
            made[place:place] = random.randbytes(random.randint(1, 8))
    return bytes(made)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_gets_a_changed_message_accepts_nobody(seed: int) -> None:
    """One message of four is changed on its way: its receiver, and everybody after it, is never done."""
    choose = random.Random(seed)
    for _ in range(1500):
        initiator, acceptor = sides()
        turn, data, changed = choose.randrange(4), initiator.start(), False
        for number, side in enumerate((acceptor, initiator, acceptor, initiator)):
            sent = mutated(data, choose) if number == turn else data
            changed = changed or not sent.startswith(
                data
            )  # more bytes after the last message are not the handshake's
            try:
                data = side.feed(sent)
            except NotAccepted:
                break
            assert not (changed and side.done)
            if not data:
                break


def test_what_cannot_be_read_cannot_forge_log_lines() -> None:
    reason = refused(sides()[1], packed("Greet\ning")).reason
    assert "\n" not in reason
