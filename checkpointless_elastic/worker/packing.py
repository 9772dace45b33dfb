"""Values with random states in them as a slot holds them: a blob, and the parts that the states are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import rng

__all__ = ["pack", "unpack"]

T = TypeVar("T")


def pack(value: Any) -> Content:
    """A value of msgspec structs; some microseconds. The parts are those of all states that live in this process."""
    rng.parts.settle()
    return Content(_encode(value), rng.parts.held)


def unpack(content: Content, kind: type[T], states: Callable[[T], Iterable[rng.RngState | None]]) -> T:
    """What `pack` gave, on another rank; ``states(value)`` names all states in it.

    Raises ProtocolError if it is damaged or of another kind.
    """
    try:
        value = msgspec.msgpack.decode(content.blob, type=kind)
        for state in states(value):
            if state is not None:
                rng.adopt(state, content.parts)
        return value
    except (msgspec.DecodeError, KeyError, UnicodeDecodeError) as error:
        raise ProtocolError(f"The private state of a rank cannot be read ({error}).") from error


_encode = msgspec.msgpack.Encoder().encode
