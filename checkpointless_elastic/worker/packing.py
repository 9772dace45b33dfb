"""Values with random states in them as a slot holds them: a blob, and the parts that the states are made of."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import rng

__all__ = ["pack", "unpack"]

T = TypeVar("T")


def pack(value: Any) -> Content:
    """A value of msgspec structs; some microseconds. The parts are those of the states in it."""
    parts: dict[int, bytes] = {}

    def numbers(state: rng.RngState) -> object:
        parts.update(state.parts)
        return state.encoded

    return Content(msgspec.msgpack.encode(value, enc_hook=numbers), parts)


def unpack(content: Content, kind: type[T]) -> T:
    """What `pack` gave, on another rank. Raises ProtocolError if it is damaged or of another kind."""

    def state(_kind: type, encoded: Any) -> rng.RngState:
        return rng.decoded(encoded, content.parts)

    try:
        return msgspec.msgpack.decode(content.blob, type=kind, dec_hook=state)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"The private state of a rank cannot be read ({error}).") from error
