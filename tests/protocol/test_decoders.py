"""The decoders are fed what no peer of ours sends: a message or a ProtocolError comes out, nothing else."""

from __future__ import annotations

import random
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol import between, guarding, messages
from checkpointless_elastic.protocol.messages import MAX_MESSAGE, Frames, Message, encode

DECODERS: dict[str, tuple[Callable[[bytes], Message], Any]] = {
    "from worker": (messages.decode_from_worker, messages.FromWorker),
    "to worker": (messages.decode_to_worker, messages.ToWorker),
    "between": (between.decode, between.Between),
    "bulk": (guarding.decode_bulk, guarding.OnBulk),
}
NESTED = [b"\x91" * depth + tail for depth in (10, 5000) for tail in (b"", b"\xc0")]


def value(kind: Any, choose: random.Random) -> Any:
    """Some value of a field's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return filled(kind, choose)
    if isinstance(kind, type) and issubclass(kind, messages.enum.Enum):
        return choose.choice(list(kind))
    if origin in (typing.Union, types.UnionType):
        return value(choose.choice(inner), choose)
    if origin is dict:
        return {value(inner[0], choose): value(inner[1], choose) for _ in range(choose.randrange(4))}
    if origin is tuple and inner[-1] is not Ellipsis:
        return tuple(value(one, choose) for one in inner)
    if origin is not None:
        return origin(value(inner[0], choose) for _ in range(choose.randrange(4)))
    return {
        bytes: lambda: choose.randbytes(choose.randrange(40)),
        str: lambda: "text"[: choose.randrange(5)],
        bool: lambda: choose.random() < 0.5,
        int: lambda: choose.choice([0, 3, -1, 1 << 40]),
        float: choose.random,
        type(None): lambda: None,
    }[kind]()


def filled(kind: type[msgspec.Struct], choose: random.Random) -> Any:
    """A message with some value in every field."""
    return kind(*(value(field.type, choose) for field in msgspec_fields(kind)))


def msgspec_fields(kind: type[msgspec.Struct]) -> Iterator[Any]:
    return iter(msgspec.structs.fields(kind))


def changed(body: bytes, choose: random.Random) -> bytes:
    """The bytes with one to four changes."""
    made = bytearray(body)
    for _ in range(choose.randint(1, 4)):
        place = choose.randrange(len(made) + 1)
        how = choose.randrange(5)
        if how == 0:
            del made[place:]
        elif how == 1:
            made[place : place + choose.randint(1, 4)] = choose.randbytes(choose.randint(1, 4))
        elif how == 2:
            made[place:place] = bytes([choose.randrange(0x80, 0x100)])
        elif how == 3:
            made[place:place] = choose.choice(NESTED)
        else:
            made[place:place] = made[: choose.randint(1, 30)]
    return bytes(made)


@pytest.mark.parametrize("name", DECODERS)
def test_every_message_comes_back_as_it_was_sent(name: str) -> None:
    decode, union = DECODERS[name]
    choose = random.Random(1)
    for kind in typing.get_args(union):
        for _ in range(20):
            message = filled(kind, choose)
            assert decode(encode(message)[4:]) == message


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", DECODERS)
def test_changed_messages_are_messages_or_a_protocol_error(name: str, seed: int) -> None:
    decode, union = DECODERS[name]
    choose = random.Random(seed)
    kinds = typing.get_args(union)
    refused = 0
    for _ in range(2000):
        body = changed(encode(filled(choose.choice(kinds), choose))[4:], choose)
        try:
            assert isinstance(decode(body), kinds)
        except ProtocolError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("name", DECODERS)
def test_noise_and_deep_nesting_are_protocol_errors(name: str) -> None:
    decode, union = DECODERS[name]
    choose = random.Random(3)
    tag = encode(filled(typing.get_args(union)[0], choose))[5:15]
    noise = [choose.randbytes(choose.randrange(200)) for _ in range(2000)]
    for body in (*noise, *NESTED, b"\x9f" + tag + b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b""):
        with pytest.raises(ProtocolError):
            decode(body)


def test_frames_give_the_same_bodies_however_the_stream_is_cut() -> None:
    choose = random.Random(4)
    for _ in range(300):
        bodies = [choose.randbytes(choose.choice([0, 1, 3, 200, 5000])) for _ in range(choose.randrange(8))]
        stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
        frames, got = Frames(), []
        while stream:
            cut = choose.choice([1, 3, 4, 5, 1000])
            got += frames.feed(stream[:cut])
            stream = stream[cut:]
        assert got == bodies


def test_frames_of_noise_are_bodies_or_a_protocol_error() -> None:
    choose = random.Random(5)
    for _ in range(2000):
        frames = Frames()
        try:
            for _ in range(5):
                assert all(
                    len(body) <= MAX_MESSAGE for body in frames.feed(choose.randbytes(choose.randrange(300)))
                )
        except ProtocolError:
            continue


def test_a_length_over_the_limit_is_refused_before_anything_of_it_is_kept() -> None:
    with pytest.raises(ProtocolError, match=f"{MAX_MESSAGE + 1} bytes; the limit is {MAX_MESSAGE}"):
        Frames().feed((MAX_MESSAGE + 1).to_bytes(4, "little"))
