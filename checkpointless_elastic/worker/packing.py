"""Values with random states in them, as bytes: each part of a state is written once, however many states share it.

A rank's private state names a dozen random states of 10 kB, most of which differ in nothing or in one part. On the wire
it is a msgpack array: the parts, then the value, in which a state is an array of the numbers of its parts.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.worker.rng import RngState

__all__ = ["pack", "unpack"]

T = TypeVar("T")

_Parts = tuple[int, int, int, dict[str, int]]


class _Table:
    """The parts met so far; equal ones are one object, see `rng.capture`."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._numbers: dict[int, int] = {}

    def take(self, value: Any) -> _Parts:
        """The numbers of a state's parts."""
        if not isinstance(value, RngState):
            raise NotImplementedError(f"{type(value).__name__} has no place in a private state")
        number = self._number
        devices = {name: number(part) for name, part in value.devices.items()}
        return number(value.python), number(value.numpy), number(value.torch_cpu), devices

    def _number(self, part: bytes) -> int:
        known = self._numbers.get(id(part))
        if known is None:
            known = self._numbers[id(part)] = len(self.parts)
            self.parts.append(part)
        return known


def pack(value: Any) -> bytes:
    """A value of msgspec structs as bytes; some microseconds."""
    table = _Table()
    body = msgspec.msgpack.Encoder(enc_hook=table.take).encode(value)
    return _encode((table.parts, msgspec.Raw(body)))


def unpack(blob: bytes, kind: type[T]) -> T:
    """What `pack` wrote. Raises ProtocolError if it is damaged or of another kind."""
    try:
        parts, body = _split(blob)

        def take(wanted: type, content: Any) -> RngState:
            python, numpy, torch_cpu, devices = msgspec.convert(content, _Parts)
            on_devices = {name: parts[number] for name, number in devices.items()}
            return RngState(parts[python], parts[numpy], parts[torch_cpu], on_devices)

        return msgspec.msgpack.Decoder(kind, dec_hook=take).decode(body)
    except (msgspec.DecodeError, IndexError, UnicodeDecodeError) as error:
        raise ProtocolError(f"The private state of a rank cannot be read ({error}).") from error


_encode = msgspec.msgpack.Encoder().encode
_split = msgspec.msgpack.Decoder(tuple[list[bytes], msgspec.Raw]).decode
